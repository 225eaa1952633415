# A node pool whose nodes use Floe, with an account of its own that may read one bucket. For a Standard cluster that is there.
#
#     terraform init && terraform apply -var project=PROJECT -var location=REGION -var cluster=CLUSTER -var bucket=BUCKET
#
# `way`: daemonset: Google's Ubuntu image, Floe installed by install/kubernetes. image: the image of floe-node.pkr.hcl, for
# projects that Google has allowed to use images of their own; then install/kubernetes/overlays/preinstalled.
# docs/KUBERNETES.md says more.
terraform {
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 7.0"
    }
  }
}

variable "project" {
  type = string
}

variable "location" {
  type = string
}

variable "cluster" {
  type = string
}

variable "bucket" {
  type        = string
  description = "The bucket of the store."
}

variable "prefix" {
  type        = string
  default     = "floe"
  description = "The store's prefix in the bucket."
}

variable "way" {
  type    = string
  default = "daemonset"
  validation {
    condition     = contains(["daemonset", "image"], var.way)
    error_message = "Say daemonset or image."
  }
}

variable "node_image" {
  type        = string
  default     = ""
  description = "With way=image: the image's name."
}

variable "planted_image" {
  type        = string
  default     = ""
  description = "The disk image of a planted cache, as projects/PROJECT/global/images/NAME; empty for none."
}

variable "machine_type" {
  type    = string
  default = "n2-standard-8"
}

variable "local_ssds" {
  type        = number
  default     = 1
  description = "Raw local SSDs for the node cache. 0 for machine types that bring theirs."
}

provider "google" {
  project = var.project
}

locals {
  # The one list of what Floe asks for.
  reading   = yamldecode(file("${path.module}/../identity/gcs-node.yaml"))
  recording = yamldecode(file("${path.module}/../identity/gcs-node-recording.yaml"))
  objects   = "projects/_/buckets/${var.bucket}/objects/${var.prefix}"
}

# Floe's daemons run on the host: this account is theirs. Workload Identity serves pods, and gives them other accounts.
resource "google_service_account" "node" {
  account_id   = "floe-node"
  display_name = "Nodes that use Floe"
}

resource "google_project_iam_member" "node" {
  project = var.project
  role    = "roles/container.defaultNodeServiceAccount"
  member  = google_service_account.node.member
}

resource "google_project_iam_custom_role" "reading" {
  role_id     = "floeNode"
  title       = local.reading.title
  description = local.reading.description
  permissions = local.reading.includedPermissions
}

resource "google_project_iam_custom_role" "recording" {
  role_id     = "floeNodeRecording"
  title       = local.recording.title
  description = local.recording.description
  permissions = local.recording.includedPermissions
}

resource "google_storage_bucket_iam_member" "reading" {
  bucket = var.bucket
  role   = google_project_iam_custom_role.reading.id
  member = google_service_account.node.member
}

resource "google_storage_bucket_iam_member" "recording" {
  bucket = var.bucket
  role   = google_project_iam_custom_role.recording.id
  member = google_service_account.node.member
  condition {
    title      = "start-up profiles and reports of damage"
    expression = "resource.name.startsWith('${local.objects}/profiles/') || resource.name.startsWith('${local.objects}/damaged/')"
  }
}

resource "google_container_node_pool" "floe" {
  name     = "floe"
  cluster  = var.cluster
  location = var.location

  autoscaling {
    min_node_count = 0
    max_node_count = 10
  }

  management {
    auto_repair = true
    # An image of one's own is built anew for each version of Kubernetes.
    auto_upgrade = var.way == "daemonset"
  }

  node_config {
    machine_type    = var.machine_type
    image_type      = var.way == "image" ? "CUSTOM_CONTAINERD" : "UBUNTU_CONTAINERD"
    service_account = google_service_account.node.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]

    labels = {
      "floe/node" = "true"
    }

    # Off the node when Floe serves: install/kubernetes.
    taint {
      key    = "startup-taint.cluster-autoscaler.kubernetes.io/floe"
      value  = "true"
      effect = "NO_SCHEDULE"
    }

    # Floe's settings, for nodes of any image: floe- and the setting's name.
    metadata = {
      disable-legacy-endpoints = "true"
      floe-store               = "gs://${var.bucket}/${var.prefix}"
      floe-index               = "none"
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    dynamic "local_nvme_ssd_block_config" {
      for_each = var.local_ssds > 0 ? [var.local_ssds] : []
      content {
        local_ssd_count = local_nvme_ssd_block_config.value
      }
    }

    dynamic "node_image_config" {
      for_each = var.way == "image" ? [var.node_image] : []
      content {
        image         = node_image_config.value
        image_project = var.project
      }
    }

    dynamic "secondary_boot_disks" {
      for_each = var.planted_image != "" ? [var.planted_image] : []
      content {
        disk_image = secondary_boot_disks.value
      }
    }
  }

  lifecycle {
    precondition {
      condition     = (var.way == "image") == (var.node_image != "")
      error_message = "way=image needs node_image, and nothing else does."
    }
  }
}
