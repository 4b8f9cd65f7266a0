"""The seccomp filter of sandboxes: which system calls, socket options and ioctl requests programs can use."""
