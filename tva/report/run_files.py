"""Names of the files in the folder of an edit."""

EDIT_JSON = "edit.json"
PAGE = "report.html"
CONFIG = "config.yaml"  # the options of the command that made the edit
CARD = "README.md"
EDITED = "edited.safetensors"
DCP = "edited"  # a folder of torch.distributed.checkpoint
