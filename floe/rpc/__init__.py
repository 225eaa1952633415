"""What Floe's gRPC services share: a server on a unix socket, and errors as status. grpc is imported here and where services are."""
