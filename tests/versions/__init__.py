"""The ends of the supported versions: `make test-versions` installs each and runs a part of the tests in it."""
