"""Dictionary: what the text of most files says anyway, so that deflate need not say it again.

Saves about 480 of 1,080 bytes for a pruned, clustered, coded network of six tensors. It belongs to format
number 1, and docs/format.md holds the same lines: a change is another format. A part that a text does not
need costs nothing; what is likeliest stands last, where deflate names it in fewest bits.
"""

LINES = """
"convtranspose","embedding","attention","recurrent","buffer","float16","bfloat16","float64","int16",
"int32","int64"{"export":{"to":"onnxruntime","path":"model.onnx"}},{"measure":{"latency":false,"thre
ads":1,"where":"*"}},"teacher":"","features":"","feature_weight":1.0}},{"factorize":{"keep":null,"ra
nk":null,"energy":null,"whiten":true}},{"kind":"written","text":"written as ","data":{"bytes":"path"
:"{"kind":"latency","text":"{"kind":"accuracy","text":"{"kind":"nbytes","text":" bytes of arrays","d
ata":{"before":"kind":"bits","text":" bits a weight, bound ","data":{"stored":,"bound":"how":"absorb
","axis":1,"groups":","layer":","aliases":{""text":"rank of plain SVD","data":{"rank":,"whitened":fa
lse}},{"form":"sum","a":,"b":{"form":"lowrank","left":,"right":{"form":"loggrid","codes":{"form":"co
ded","planes":[,"scale":{"form":"dense","shape":[],"terms":2{"form":"affine","codes":{"form":"coded"
,"planes":[,"scale":{"form":"dense","shape":[,1]},"zero":{"form":"dense","shape":[,1]},"bits":4,"gro
up":64"text":"8 bits, signal to noise dB","data":{"decibels":"kind":"trained","text":" epochs","data
":{"loss":"running_mean":{"shape":[,"kind":"buffer","running_var":{"num_batches_tracked":{"shape":[]
,"dtype":"int64","kind":"buffer","digest":"conv1.weight":{"shape":[,3,3],"kind":"conv","digest":"lay
er1.0.conv1.weight","bn1.weight","fc3.bias","fc2.bias","fc1.bias":{"shape":[],"kind":"linear","diges
t":"","form":"dense"},"fc2.weight":{"fc1.weight":{"","base":"","recipe":{"tersor":1,"seed":0,"steps"
:[{"distill":{"finetune":{"epochs":1.0,"lr":0.0001,{"quantize":{"epochs":0.0,"lr":0.001,"schedule":"
cosine","optimizer":"adamw","weight_decay":0.0,"share":0.0,"temperature":4.0,"bf16":false,"where":"*
","scheme":"uniform","bits":8,"per":"row","group":64,"symmetric":true,"range":"minmax","percentile":
99.9,"terms":1,"rule":"twn"}},"keep":0.5,"per":"tensor","group":64,"threshold":null,"pattern":null,"
ramp":0.0,"rounds":1,"rewind":"none"}},{"cluster":{"entries":16,"per":"tensor","start":"exact","iter
ations":50}},{"entropy":{"coder":"auto","where":"*"}}]},"ledger":[{"events":[{"kind":"time","text":"
prune took its time","data":{"seconds":0.}}]},{"events":[kind":"skipped","text":"no coder shortens i
ts  bytes"},{"kind":"done","text":"  to  bytes","data":{"before":,"after":}},"kind":"done","text":"k
ept  of  weights (10.0%)","data":{"kept":"kind":"done","text":"16 shared values","data":{"entries":1
6}},{"site":"fc1.weight","how":"wrap","before":"","after":"","how":"refine","after":"{"site":"fc1.we
ight","how":"lossless"},{"site":"{"form":"masked","keep":{"form":"coded","planes":[],"pack":true},"b
ody":{"form":"codebook","index":{"form":"coded","planes":[],"kept":true},"book":{"form":"dense","sha
pe":[16]}}}},{"sites":{"fc1.weight":{"shape":[300],"kind":"linear","digest":"","form":{"form":"maske
d","keep":{"form":"coded","planes":[
"""

DICTIONARY = LINES.replace("\n", "").encode()
