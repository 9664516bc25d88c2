"""One dense ViT per downstream task: select, customise, export, measure."""
