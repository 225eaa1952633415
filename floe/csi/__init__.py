"""The CSI driver: models as volumes of pods whose images come by any other way."""
