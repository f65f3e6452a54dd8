"""``python -m bench finetune``: what regularizers do to a pretrained encoder that is fine-tuned on little real text.

`data` gets weights and sentences from the package index, `methods` is the table of what is compared, `train` makes one
run, `plan` says which runs there are, `results` keeps each as a line, `report` makes tables and figures of them.
"""
