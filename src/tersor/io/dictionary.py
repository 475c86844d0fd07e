"""Dictionary: preset dictionaries for deflate: strings that most texts contain.

Saves some 500 of 1,000 bytes for a network of six tensors, pruned, clustered and coded. The lines are part
of format number 1 and are repeated in docs/format.md; changing them changes the format. Settings that were
renamed since (per=channel, teacher_weight, init) cost 20 bytes more. Unused strings cost nothing.
The most frequent ones are at the end, where deflate refers to them in the fewest bits.
"""

LINES = """
"convtranspose","embedding","attention","recurrent","buffer","float16","bfloat16","float64","int16",
"int32","int64""attachments":{"config.json":{"nbytes":,"sha256":"","deflated":true}}"past":[["prune"
,""],["quantize",""],["entropy",""changes":[["replace","","product",{"layers":2}],["set","","num_hea
ds",]],"grids":{"","form":{"form":"grid","scale":{"form":"dense","shape":[1]},"zero":{"form":"dense"
,"shape":[1],"dtype":"uint8"}}}"stale":true"signed":true"indices":[[0,1,2,1,4,]],"kept":{"0":0,"1":1
},"origin":" left" right""runs":["member":{"form":"dense","shape":["coder":"fast"{"form":"sum","a":,
"b":{"form":"loggrid","codes":{"form":"coded","planes":[,"terms":2"zero":{"form":"dense","shape":[,1
]},"bits":4,"aliases":{""layer":""running_mean":{"shape":[],"kind":"buffer","digest":"running_var":{
"num_batches_tracked":{"shape":[],"dtype":"int64","kind":"buffer","digest":"aef378aa25f4a975","form"
:"dense"},"layer1.0.conv2.weight","bn1.weight"norm1.bias",,3,3],"kind":"conv","digest":"conv1.weight
":{"shape":[,1,5,5],"kind":"conv","digest":"{"export":{"to":"onnxruntime","path":"model.onnx"}},"tea
cher":"","features":"","feature_weight":1.0}},{"factorize":{"keep":null,"rank":null,"energy":null,"w
hiten":true}},{"form":"lowrank","left":{"form":"affine","group":4,"codes":{"form":"dense","shape":[,
1]},"scale":{"form":"dense","shape":[,1]}},"right":{"form":"affine","codes":{"form":"coded","planes"
:[],"size":["share":0.5,"temperature":2.0,"bf16":true,"channels_last":true,"where":"*","keep":0.05,"
per":"spread","pattern":"2:4","form":{"form":"masked","keep":"dense","body":{"form":"codebook","inde
x":"dense","book":{"form":"dense","shape":["recipe":{"tersor":1,"seed":0,"steps":[{"distill":{"finet
une":{"rdoq":{"bits":{"epochs":1.0,"lr":0.01,"schedule":"cosine","optimizer":"adamw","weight_decay":
0.0,"share":0.0,"temperature":4.0,"bf16":false,"channels_last":false,"where":"*.bias","scheme":"unif
orm","bits":8,"per":"row","group":64,"symmetric":true,"range":"minmax","percentile":99.9,"terms":1,"
rule":"twn"}},{"measure":{"latency":false,"threads":1,"batch":1,"where":"*"}}]},"ledger":["","","wri
tten","written as ",{"bytes":"path":"["","","latency",""text":"rank of plain SVD",{"rank":,"whitened
":false}]},"base":"","recipe":{"tersor":1,"seed":0,"steps":[{"prune":{"epochs":0.0,"lr":0.001,"sched
ule":"cosine","optimizer":"adamw","weight_decay":0.0,"share":0.0,"temperature":4.0,"bf16":false,"cha
nnels_last":false,"where":"*","keep":0.05,"per":"tensor","group":64,"threshold":null,"pattern":null,
"ramp":0.0,"rounds":1,"rewind":"none"}},{"cluster":{"epochs":0.0,"lr":0.001,"schedule":"cosine","opt
imizer":"adamw","weight_decay":0.0,"share":0.0,"temperature":4.0,"bf16":false,"channels_last":false,
"where":"*","entries":16,"per":"tensor","start":"exact","iterations":50}},{"quantize":{"epochs":0.0,
"lr":0.001,"schedule":"cosine","optimizer":"adamw",{"entropy":{"coder":"max","where":"*"}}]},"ledger
":[{"events":[[0,"wrap",""bn1.weight":{"shape":[16],"digest":","form":"dense"},"fc2.bias":{"shape":[
],"kind":"linear","digest":","form":"dense"},"fc3.bias":{"shape":[10],"fc3.weight":{"shape":[10,100]
,"kind":"{"form":"affine","codes":{"form":"coded","planes":[],"codes":"dense","scale":{"form":"dense
","shape":[,1]}}},["","","trained","1 x 1 epochs",{"steps":,"loss":1.0}]]},{"events":[[0,"refine",nu
ll,"[0,"absorb",""axis":1,"groups":2,[0,"","done","kept  of  weights (5.0%)",{"kept":}],[2,"wrap","]
]},{"events":[[0,"","bits","4. bits a weight, order-0 bound 3.",{"stored":,"bound":["","","nbytes","
 to  bytes of arrays",{"before":,"after":}],["","","accuracy","0.9 to 0.9, drop +0. points (p = 0.",
{"before":[0.9,0.9],"after":[0.9,0.9],"drop":[0.,-0.],"p":1.0,"n":10000}]]}]},{"events":[[0,"lossles
s"],[0,"","done"," to  bytes",{"before":,"after":}],[1,"lossless","],[1,"","done","1200 to  bytes",{
"before":,"after":}],[2,"lossless"],[2,"","skipped","no coder shortens its 40 bytes"]]}]}[3,"","done
","8 bits, signal to noise 4 dB",{"decibels":4[0,"","done","16 shared values",{"entries":16}],[2,"re
fine",null,"],[4,"refine","form":{"form":"masked","keep":{"form":"coded","planes":[],"pack":true},"b
ody":{"form":"codebook","index":{"form":"coded","planes":[],"kept":true},"book":{"form":"dense","sha
pe":[16]}}}},{"sites":{"fc1.weight":{"shape":[300,784],"kind":"linear","digest":"","form":{"form":"m
asked","keep":{"form":"coded","planes":["fc2.weight":{"shape":[],"kind":"conv","digest":"],"kind":"l
inear","digest":"","form":{"form":"affine","codes":"dense","scale":{"form":"dense","shape":[1,1]}}},
"fc1.bias":{"shape":[300],"kind":"linear","digest":"","form":{"form":"coded","planes":[],"turned":tr
ue}},"fc2.weight":{"shape":[
"""

# For files with the short header, which have no digests and no ledger. Saves about 10 of 110 bytes compared
# with the other one. The order was found by trial on two small networks, each compressed in six ways, with
# the names of three libraries.
TINY_LINES = """
"indices":[[0,"kept":{"0":0,"1":1},"origin":""changes":[["set","["replace","","product",{"layers":2}
]]"grids":{"":{"form":{"form":"grid","scale":"convtranspose","embedding","attention","recurrent","fl
oat16","bfloat16","float64","int16","int32","int64""aliases":{"axis":1,"groups":"layer":""dtype":"{"
form":"sum","a":{"form":"lowrank","left":"b":"right":{"form":"loggrid","codes":"terms":2,"group":64"
zero":{"form":"dense","shape":[running_mean":{"shape":[running_var":{"shape":[num_batches_tracked":{
"shape":[],"dtype":"int64","kind":"buffer","form":"dense"},""embed."blocks."features."classifier.],"
pack":true},"body":{"form":"codebook","index":{"form":"coded","planes":["bits":2,"book":{"form":"den
se","shape":[16]}}}},""bits":8,"conv1.weight":{"shape":[]},"scale":{"form":"dense","shape":[1,1]}}},
"]},"body":{"form":"codebook","index":{"form":"coded","planes":[],"kept":true},"scale":{"form":"dens
e","shape":[1,1]}}}},"net..weight":{"shape":[],"kept":true},"book":{"form":"dense","shape":[8]}}}},"
"conv2.weight":{"shape":["},"fc3.weight":{"shape":[10,],"pack":true},"body":{"form":"affine","bits":
4,"codes":{"form":"coded","planes":[.bias":{"shape":[10],"kind":"linear","form":"dense"}}}],"turned"
:true}},"fc2.weight":{"shape":[],"kind":"linear","form":{"form":"coded","planes":[],"kind":"linear",
"form":{"form":"affine","bits":4,"codes":{"form":"coded","planes":[{"sites":{"fc1.weight":{"shape":[
300,784],"kind":"linear","form":{"form":"masked","keep":{"form":"coded","planes":[]},"scale":{"form"
:"dense","shape":[10,1]}}},",5,5],"kind":"conv","form":{"form":"affine","bits":4,"codes":{"form":"co
ded","planes":[]}},"fc2.weight":{"shape":[],"kind":"linear","form":"dense"},"layers..bias":{"shape":
[10],"form":"dense"}}}
"""

DICTIONARY = LINES.replace("\n", "").encode()
TINY_DICTIONARY = TINY_LINES.replace("\n", "").encode()
