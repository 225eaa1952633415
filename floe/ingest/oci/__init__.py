"""OCI and Docker images: where they come from, what their layers hold, and how models are attached to them."""
