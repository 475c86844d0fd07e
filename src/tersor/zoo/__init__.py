"""Zoo: architectures by name, and tasks on composed scenes to train and judge them.

scenes.py          garments on photographs: images, boxes, masks
scene_tasks.py     tasks from them
boxes.py           what surrounds a detector: targets, loss, decoding, average precision
precision.py       mean average precision
anchors.py         the same for a detector with anchors
yolo_lite.py       the one architecture of our own
ssdlite.py         torchvision's SSDLite for small images
architectures.py   all of them
libraries.py       those of torchvision and timm, by name
measured.py        what the benches found for each
"""
