"""What a release is checked for: `make release-check` builds one as it would be published; `make release` cuts it."""
