"""Checkpoints to and from Hugging Face's folders of config.json and safetensors.

from_hf.py     a folder of theirs -> a checkpoint of ours
to_hf.py       a checkpoint of ours -> a folder of theirs
prove.py       both compute the same logits
family.py      what a family of models is: its table of fields, its table of tensors
gpt2.py ...    a family each, both directions from the same tables
megasparse.py  the family of what no other can say, with modeling_megasparse.py, the file that goes along
folder.py      reading their folder;  output.py  writing either, a file at a time
"""
