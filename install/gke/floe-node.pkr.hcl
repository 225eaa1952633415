# A node image for GKE with Floe in it: Google's own Ubuntu node image, and bootstrap-node.sh --image. From a checkout:
#
#     install/kubernetes/wheelhouse.sh wheels
#     packer init install/gke
#     packer build -var project_id=PROJECT -var zone=ZONE -var source_image=ubuntu-gke-... -var wheels=wheels install/gke
#
# The image names no store and holds no key: nodes take settings from their metadata, and credentials from their service
# account. docs/KUBERNETES.md says which clusters take such an image.
packer {
  required_version = ">= 1.7.0"
  required_plugins {
    googlecompute = {
      source  = "github.com/hashicorp/googlecompute"
      version = "~> 1"
    }
  }
}

variable "project_id" {
  type        = string
  description = "The project that builds and keeps the image."
}

variable "zone" {
  type        = string
  description = "Where the build machine runs."
}

variable "source_image" {
  type        = string
  description = "An Ubuntu node image of the cluster's version: gcloud compute images list --project ubuntu-os-gke-cloud --no-standard-images"
}

variable "wheels" {
  type        = string
  description = "The directory that wheelhouse.sh filled."
}

variable "runtime_handler" {
  type        = string
  default     = "runc-floe"
  description = "Pods of this handler use Floe; none: all pods."
}

variable "image_family" {
  type    = string
  default = "floe-node"
}

variable "machine_type" {
  type    = string
  default = "e2-standard-4"
}

variable "network" {
  type    = string
  default = "default"
}

variable "subnetwork" {
  type    = string
  default = ""
}

variable "use_iap" {
  type        = bool
  default     = false
  description = "Reach the build machine through Identity-Aware Proxy; it has no address of its own then."
}

locals {
  stamp = formatdate("YYYYMMDD-hhmmss", timestamp())
  # Relative to this file, wherever packer is started.
  install = "${path.root}/.."
}

source "googlecompute" "node" {
  project_id              = var.project_id
  zone                    = var.zone
  machine_type            = var.machine_type
  network                 = var.network
  subnetwork              = var.subnetwork
  source_image            = var.source_image
  source_image_project_id = ["ubuntu-os-gke-cloud"]
  image_name              = "${var.image_family}-${local.stamp}"
  image_family            = var.image_family
  image_description       = "${var.source_image} with Floe"
  # The build needs nothing of Google's, so its machine gets no account.
  disable_default_service_account = true
  enable_secure_boot              = true
  omit_external_ip                = var.use_iap
  use_internal_ip                 = var.use_iap
  use_iap                         = var.use_iap
  ssh_username                    = "packer"
}

build {
  sources = ["source.googlecompute.node"]

  provisioner "shell" {
    inline = ["mkdir -p /tmp/floe/install /tmp/floe/wheels"]
  }

  provisioner "file" {
    # With the slash: what is in it.
    source      = "${var.wheels}/"
    destination = "/tmp/floe/wheels"
  }

  provisioner "file" {
    sources = [
      "${local.install}/bootstrap-node.sh",
      "${local.install}/bootstrap",
      "${local.install}/systemd",
      "${local.install}/gke",
    ]
    destination = "/tmp/floe/install/"
  }

  provisioner "shell" {
    inline = ["sudo bash /tmp/floe/install/gke/provision.sh /tmp/floe/wheels '${var.runtime_handler}'"]
  }
}
