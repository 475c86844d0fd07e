"""Dictionary: what the text of most files says anyway, so that deflate need not say it again.

Saves 660 of 1,420 bytes for a network of six tensors, pruned, clustered and coded. It belongs to format
number 1, and docs/format.md holds the same lines: a change is another format. A part that a text does not
need costs nothing; what is likeliest stands last, where deflate names it in fewest bits.
"""

LINES = """
"convtranspose","embedding","attention","recurrent","buffer","float16","bfloat16","float64","int16",
"int32","int64"{"export":{"to":"onnxruntime","path":"model.onnx"}},{"measure":{"latency":false,"thre
ads":1,"batch":1,"where":"*"}}"teacher":"","features":"","feature_weight":1.0}},{"factorize":{"keep"
:null,"rank":null,"energy":null,"whiten":true}},{"kind":"written","text":"written as ","data":{"byte
s":"path":"{"kind":"latency","text":"{"kind":"accuracy","text":"0.9 to 0.9, drop +0. points (p = 0."
,"data":{"before":[0.9,0.9],"after":[0.9,"drop":[0.,-0.],"p":0.,"n":10000}},{"kind":"nbytes","text":
" bytes of arrays","data":{"before":,"after":"kind":"bits","text":"0. bits a weight, order-0 bound 0
.","data":{"stored":,"bound":"how":"absorb","axis":1,"groups":","layer":","aliases":{""text":"rank o
f plain SVD","data":{"rank":,"whitened":false}},{"form":"sum","a":,"b":{"form":"lowrank","left":,"ri
ght":{"form":"loggrid","codes":{"form":"coded","planes":[,"scale":{"form":"dense","shape":[],"terms"
:2"zero":{"form":"dense","shape":[,1]},"bits":4,"group":64"running_mean":{"shape":[,"kind":"buffer",
"running_var":{"num_batches_tracked":{"shape":[],"dtype":"int64","kind":"buffer","digest":"conv1.wei
ght":{"shape":[,1,5,5],"kind":"conv","digest":"layer1.0.conv2.weight","bn1.weight",,3,3],"kind":"con
v","digest":""recipe":{"tersor":1,"seed":0,"steps":[{"distill":{"finetune":{"epochs":1.0,"lr":0.0001
,"epochs":0.0,"lr":0.001,"schedule":"cosine","optimizer":"adamw","weight_decay":0.0,"share":0.0,"tem
perature":4.0,"bf16":false,"channels_last":false,"where":"*.bias","scheme":"uniform","bits":8,"per":
"row","group":64,"symmetric":true,"range":"minmax","percentile":99.9,"terms":1,"rule":"twn"}},"share
":0.5,"temperature":2.0,"bf16":true,"channels_last":true,"where":"*","keep":0.05,"per":"spread","gro
up":64,"threshold":null,"pattern":null,"ramp":0.5,"rounds":1,"rewind":"none"}},{"cluster":{"epochs":
"entries":16,"per":"tensor","start":"exact","iterations":50}},{"quantize":{"{"entropy":{"coder":"aut
o","where":"*"}}]},"ledger":[{"events":[{""kind":"done","text":"8 bits, signal to noise 4 dB","data"
:{"decibels":4{"kind":"trained","text":"1 x 24.0 epochs","data":{"steps":,"loss":0.}},{"kind":"time"
,"text":"cluster took its time","data":{"seconds":}}]},{"events":[{"site":"kind":"skipped","text":"n
o coder shortens its  bytes"},{"kind":"done","text":"  to  bytes","data":{"before":,"after":}},{"kin
d":"time","text":"entropy took its time","data":{"seconds":0.}}]}]}"kind":"done","text":"kept  of  w
eights (5.0%)","data":{"kept":"kind":"done","text":"16 shared values","data":{"entries":16}},{"site"
:"fc1.weight","how":"wrap","before":","how":"refine","after":""},{"site":"fc2.weight","how":"lossles
s"},{"site":""}},"base":"","recipe":{"tersor":1,"seed":0,"steps":[{"prune":{"epochs":24.0,"lr":0.002
,"schedule":"cosine","optimizer":"adamw","weight_decay":0.0,"fc2.bias":{"shape":[],"kind":"linear","
digest":"","form":"dense"},"fc3.bias":{"shape":[10],"fc3.weight":{"shape":[10,100],"kind":"{"form":"
affine","codes":{"form":"coded","planes":[],"codes":"dense","scale":{"form":"dense","shape":[,1]}}},
"fc2.weight":{"shape":[],"kind":"conv","digest":"],"kind":"linear","digest":"","form":{"form":"affin
e","codes":"dense","scale":{"form":"dense","shape":[1,1]}}},"fc1.bias":{"shape":[300],"kind":"linear
","digest":"","form":{"form":"masked","keep":{"form":"coded","planes":[],"pack":true},"body":{"form"
:"codebook","index":{"form":"coded","planes":[],"kept":true},"book":{"form":"dense","shape":[16]}}}}
,{"sites":{"fc1.weight":{"shape":[300,784],"kind":"linear","digest":"","form":{"form":"masked","keep
":{"form":"coded","planes":[
"""

# Of files with the short header, which have no digests and no ledger: some 10 of 110 bytes less than with the
# other. The order was found by trial on two small networks, compressed in six ways, names as three libraries
# have them.
TINY_LINES = """
"convtranspose","embedding","attention","recurrent","float16","bfloat16","float64","int16","int32","
int64""aliases":{"axis":1,"groups":"layer":""dtype":"{"form":"sum","a":{"form":"lowrank","left":"b":
"right":{"form":"loggrid","codes":"terms":2,"group":64"zero":{"form":"dense","shape":[running_mean":
{"shape":[running_var":{"shape":[num_batches_tracked":{"shape":[],"dtype":"int64","kind":"buffer","f
orm":"dense"},""embed."blocks."features."classifier.],"pack":true},"body":{"form":"codebook","index"
:{"form":"coded","planes":["bits":2,"book":{"form":"dense","shape":[16]}}}},""bits":8,"conv1.weight"
:{"shape":[]},"scale":{"form":"dense","shape":[1,1]}}},"]},"body":{"form":"codebook","index":{"form"
:"coded","planes":[],"kept":true},"scale":{"form":"dense","shape":[1,1]}}}},"net..weight":{"shape":[
],"kept":true},"book":{"form":"dense","shape":[8]}}}},""conv2.weight":{"shape":["},"fc3.weight":{"sh
ape":[10,],"pack":true},"body":{"form":"affine","bits":4,"codes":{"form":"coded","planes":[.bias":{"
shape":[10],"kind":"linear","form":"dense"}}}],"turned":true}},"fc2.weight":{"shape":[],"kind":"line
ar","form":{"form":"coded","planes":[],"kind":"linear","form":{"form":"affine","bits":4,"codes":{"fo
rm":"coded","planes":[{"sites":{"fc1.weight":{"shape":[300,784],"kind":"linear","form":{"form":"mask
ed","keep":{"form":"coded","planes":[]},"scale":{"form":"dense","shape":[10,1]}}},",5,5],"kind":"con
v","form":{"form":"affine","bits":4,"codes":{"form":"coded","planes":[]}},"fc2.weight":{"shape":[],"
kind":"linear","form":"dense"},"layers..bias":{"shape":[10],"form":"dense"}}}
"""

DICTIONARY = LINES.replace("\n", "").encode()
TINY_DICTIONARY = TINY_LINES.replace("\n", "").encode()
