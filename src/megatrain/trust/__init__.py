"""What is saved can be trusted: manifests of folders, chains of them, signatures. Needs no torch."""
