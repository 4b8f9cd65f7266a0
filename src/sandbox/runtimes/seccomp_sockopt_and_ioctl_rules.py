"""Socket options and ioctl requests that the system call filter allows."""

from collections.abc import Mapping

_SOL_SOCKET = 1
_SOL_IP, _SOL_TCP, _SOL_UDP, _SOL_IPV6, _SOL_NETLINK = 0, 6, 17, 41, 270

IGNORED_SOCKOPTS: Mapping[int, tuple[int, ...]] = {
    _SOL_SOCKET: (7, 8, 13, 47), _SOL_IP: (11,), _SOL_TCP: (9,), _SOL_UDP: (104,), _SOL_IPV6: (25,),
}  # fmt: skip
"""Options by level that succeed without effect.

SO_SNDBUF: the kernel handles all messages of one netlink request without interruption, and the buffer limits the size
of a request: 0.9 s for 8 MiB. SO_RCVBUF: each connection that nobody accepts inherits the listener's size. IP_RECVERR,
IPV6_RECVERR: no control group counts the error queue, and the C library requires them for DNS. TCP_DEFER_ACCEPT: a
connection stays half-open for hours if its peer disappears silently. UDP_GRO: when the first socket enables it and when
the last such socket is closed, the kernel changes its own code, which interrupts every processor of the machine.
Without the option, a program gets each datagram separately. SO_LINGER: the kernel can take arbitrarily long to close a
connection. If no program has received a connection that was sent through Unix sockets, a kernel thread closes it, and
meanwhile closes no other file of the machine. The wait never ends if the thread has to close the peer next.
SO_MAX_PACING_RATE: the kernel keeps a closed connection for 2 minutes if its unsent data waits for the pacing rate,
even after the sandbox has ended. Nothing counts such connections, and the memory that they keep.
"""

ALLOWED_SOCKOPTS: Mapping[int, frozenset[int]] = {
    # REUSEADDR TYPE ERROR DONTROUTE BROADCAST KEEPALIVE OOBINLINE NO_CHECK PRIORITY REUSEPORT PASSCRED
    # SNDLOWAT RCVTIMEO SNDTIMEO BINDTODEVICE TIMESTAMP PASSSEC TIMESTAMPNS RXQ_OVFL PEEK_OFF
    # INCOMING_CPU and the variants with 64-bit times, PASSPIDFD
    _SOL_SOCKET: frozenset({
        2, 3, 4, 5, 6, 9, 10, 11, 12, 15, 16, 19, 20, 21, 25, 29, 34, 35, 40, 42, 49,
        63, 64, 66, 67, 76,
    }),
    # TOS TTL RECVOPTS RETOPTS PKTINFO MTU_DISCOVER RECVTTL RECVTOS FREEBIND RECVORIGDSTADDR CHECKSUM
    # BIND_ADDRESS_NO_PORT RECVFRAGSIZE RECVERR_RFC4884 MULTICAST_IF MULTICAST_TTL MULTICAST_LOOP ADD_MEMBERSHIP
    # DROP_MEMBERSHIP MULTICAST_ALL UNICAST_IF LOCAL_PORT_RANGE
    _SOL_IP: frozenset({
        1, 2, 6, 7, 8, 10, 12, 13, 15, 20, 23, 24, 25, 26, 32, 33, 34, 35, 36, 49, 50, 51,
    }),
    # NODELAY MAXSEG CORK KEEPIDLE KEEPINTVL KEEPCNT SYNCNT LINGER2 WINDOW_CLAMP QUICKACK CONGESTION
    # THIN_LINEAR_TIMEOUTS THIN_DUPACK USER_TIMEOUT FASTOPEN NOTSENT_LOWAT FASTOPEN_CONNECT FASTOPEN_NO_COOKIE INQ
    _SOL_TCP: frozenset({1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 13, 16, 17, 18, 23, 25, 30, 34, 36}),
    # SEGMENT
    _SOL_UDP: frozenset({103}),
    # 2292PKTINFO 2292HOPLIMIT FLOWINFO UNICAST_HOPS MULTICAST_IF MULTICAST_HOPS MULTICAST_LOOP DROP_MEMBERSHIP
    # MTU_DISCOVER MTU V6ONLY MULTICAST_ALL RECVERR_RFC4884 FLOWINFO_SEND RECVPKTINFO RECVHOPLIMIT RECVPATHMTU
    # DONTFRAG RECVTCLASS TCLASS AUTOFLOWLABEL ADDR_PREFERENCES RECVORIGDSTADDR UNICAST_IF FREEBIND
    _SOL_IPV6: frozenset({
        2, 8, 11, 16, 17, 18, 19, 21, 23, 24, 26, 29, 31, 33, 49, 51, 60, 62, 66, 67, 70, 72, 74, 76, 78,
    }),
    # ADD_MEMBERSHIP DROP_MEMBERSHIP PKTINFO NO_ENOBUFS CAP_ACK EXT_ACK GET_STRICT_CHK
    _SOL_NETLINK: frozenset({1, 2, 3, 5, 10, 11, 12}),
}  # fmt: skip
"""Allowed options by level.

Among those that are not allowed:
- filters (SO_ATTACH_FILTER and similar), UDP_CORK, flow labels, SO_RESERVE_MEM, SO_RCVLOWAT, TCP_ULP, TCP_MD5SIG and
  TCP_REPAIR
- IPv6 and source-specific multicast memberships, which have no limit per socket
- SO_TIMESTAMPING, which queues sent data
- SO_ZEROCOPY, after which received data is in pages that TCP_ZEROCOPY_RECEIVE can map
- IP_MINTTL and IPV6_MINHOPCOUNT: a socket that drops replies leaves the peer's connection half-open for hours
"""

REFUSED_GETSOCKOPTS: Mapping[int, tuple[int, ...]] = {
    _SOL_TCP: (35,), _SOL_IP: (41, 48), _SOL_IPV6: (48,), _SOL_NETLINK: (9,),
}  # fmt: skip
"""getsockopt options by level that are refused.

TCP_ZEROCOPY_RECEIVE maps pages of received data into the program. They are not charged to any control group.
IP_MSFILTER, MCAST_MSFILTER: the kernel holds the lock for network devices while it accesses the program's memory.
NETLINK_LIST_MEMBERSHIPS: the same with the lock of the host's netlink socket table. Meanwhile, no netlink socket
can be closed, and no network namespace can be created.
"""

_TERMINAL_IOCTLS = (
    0x5401, 0x5402, 0x5403, 0x5404,  # TCGETS, TCSETS, TCSETSW, TCSETSF
    0x5405, 0x5406, 0x5407, 0x5408,  # TCGETA, TCSETA, TCSETAW, TCSETAF
    0x5409, 0x540A, 0x540B,  # TCSBRK, TCXONC, TCFLSH
    0x540C, 0x540D, 0x540E,  # TIOCEXCL, TIOCNXCL, TIOCSCTTY
    0x540F, 0x5410, 0x5411,  # TIOCGPGRP, TIOCSPGRP, TIOCOUTQ (on sockets: SIOCOUTQ)
    0x5413, 0x5414,  # TIOCGWINSZ, TIOCSWINSZ
    0x5415, 0x5416, 0x5417, 0x5418, 0x5419, 0x541A,  # TIOCMGET, -BIS, -BIC, -SET, TIOCGSOFTCAR, TIOCSSOFTCAR
    0x541B,  # FIONREAD, also on files, pipes, sockets and inotify instances
    0x5420, 0x5422, 0x5424,  # TIOCPKT, TIOCNOTTY, TIOCGETD
    0x5425, 0x5427, 0x5428, 0x5429,  # TCSBRKP, TIOCSBRK, TIOCCBRK, TIOCGSID
    0x802C542A, 0x402C542B, 0x402C542C, 0x402C542D,  # TCGETS2, TCSETS2, TCSETSW2, TCSETSF2
    0x80045430, 0x40045431, 0x80045432, 0x40045436,  # TIOCGPTN, TIOCSPTLCK, TIOCGDEV, TIOCSIG
    0x80045438, 0x80045439, 0x80045440, 0x5441,  # TIOCGPKT, TIOCGPTLCK, TIOCGEXCL, TIOCGPTPEER
)  # fmt: skip

_FILE_IOCTLS = (
    0x5421, 0x5450, 0x5451,  # FIONBIO, FIONCLEX, FIOCLEX
    0x80086601, 0x80046601, 0x80087601,  # FS_IOC_GETFLAGS, FS_IOC32_GETFLAGS, FS_IOC_GETVERSION
    0x801C581F, 0x81009431, 0x80111500,  # FS_IOC_FSGETXATTR, FS_IOC_GETFSLABEL, FS_IOC_GETFSUUID
    0x2, 0x5460,  # FIGETBSZ, FIOQSIZE
    0xB701, 0xB702, 0xB703, 0xB704,  # NS_GET_USERNS, NS_GET_PARENT, NS_GET_NSTYPE, NS_GET_OWNER_UID
    0x80045200,  # RNDGETENTCNT
)  # fmt: skip

_SOCKET_IOCTLS = (
    0x8901, 0x8902, 0x8903, 0x8904, 0x8905,  # FIOSETOWN, SIOCSPGRP, FIOGETOWN, SIOCGPGRP, SIOCATMARK
    0x8906, 0x8907, 0x80108906, 0x80108907,  # SIOCGSTAMP and SIOCGSTAMPNS, and their variants with 64-bit times
    0x8910, 0x8912, 0x8913, 0x8915,  # SIOCGIFNAME, SIOCGIFCONF, SIOCGIFFLAGS, SIOCGIFADDR
    0x8917, 0x8919, 0x891B, 0x891D,  # SIOCGIFDSTADDR, SIOCGIFBRDADDR, SIOCGIFNETMASK, SIOCGIFMETRIC
    0x8921, 0x8927, 0x8933, 0x8938,  # SIOCGIFMTU, SIOCGIFHWADDR, SIOCGIFINDEX, SIOCGIFCOUNT
    0x8942, 0x8970, 0x894B,  # SIOCGIFTXQLEN, SIOCGIFMAP, SIOCOUTQNSD
)  # fmt: skip

ALLOWED_IOCTLS = (*_TERMINAL_IOCTLS, *_FILE_IOCTLS, *_SOCKET_IOCTLS)
"""Allowed ioctl requests. Others fail with ENOTTY, as on a kernel that does not have them.

Among the others:
- FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_FIEMAP, FS_IOC_GETFSMAP and ext4's own requests walk all extents of a file
  or all blocks of its file system without interruption. A walk of ten million extents takes 4 to 9 s. In a file
  without ext4's extents flag, FIEMAP inspects each block of a hole: 0.4 s for each 8 MiB of the hole.
- PAGEMAP_SCAN and PROCMAP_QUERY walk all page tables or all mappings of a process without interruption.
- FICLONE, FICLONERANGE and FIDEDUPERANGE share extents between files. Programs copy the data instead.
- Requests that only an administrator may make, and requests to devices that a sandbox does not have.
"""

DENIED_IOCTLS = (
    0x5412, 0x541C,  # TIOCSTI types into a terminal, TIOCLINUX pastes into one
    0x5423,  # TIOCSETD: loads a module of the host for another line discipline
    0x8940, 0x8941, 0x8982, 0x8983,  # SIOCGIFBR, SIOCSIFBR, SIOCGIFVLAN, SIOCSIFVLAN: load a module of the host
    0x8980, 0x8981,  # SIOCADDDLCI, SIOCDELDLCI: the same, before Linux 5.11
    0x89A0, 0x89A1, 0x89A2, 0x89A3,  # SIOCBRADDBR, SIOCBRDELBR, SIOCBRADDIF, SIOCBRDELIF: the same
)  # fmt: skip
"""Requests that fail with EPERM, as for a caller without the privilege."""

IGNORED_IOCTLS = (0x5452,)
"""FIOASYNC: signals for events on files. It succeeds without effect, because nginx requires it."""

IOCTL_TYPE_MASK, KVM_IOCTL_TYPE = 0xFF00, 0xAE00
"""The bits with the type of a request, and the type of KVM's requests. QEMU makes dozens of these on /dev/kvm."""
