"""What a sandbox may do with sockets.

A socket holds more memory than the control group counts: filters, datagrams that are held back, errors that nobody
reads, group memberships, and all that arrives on a connection before it is accepted. So options are allowed by name.
"""

from collections.abc import Mapping

AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
FAMILIES = (AF_UNIX, AF_INET, AF_INET6, AF_NETLINK)
INTERNET_FAMILIES = (AF_INET, AF_INET6)
TYPE_MASK = 0xF
INTERNET_TYPES = (1, 2)
"""SOCK_STREAM and SOCK_DGRAM. SOCK_PACKET would make a packet socket of an AF_INET one."""
INTERNET_PROTOCOLS = (0, 6, 17)
"""The type's own, TCP and UDP. For any other protocol the kernel looks for a module of the host."""

MSG_MORE, SPLICE_F_MORE = 0x8000, 0x4
"""Hold a datagram back, up to 64 KiB in each socket that nothing counts. TCP_CORK does the same for streams."""

_SOL_SOCKET = 1
_SOL_IP, _SOL_TCP, _SOL_UDP, _SOL_IPV6, _SOL_NETLINK = 0, 6, 17, 41, 270

IGNORED_OPTIONS: Mapping[int, tuple[int, ...]] = {_SOL_SOCKET: (8,), _SOL_IP: (11,), _SOL_TCP: (9,), _SOL_IPV6: (25,)}
"""By level; they succeed and change nothing. SO_RCVBUF: each connection that nobody accepts has the listener's size.
IP_RECVERR, IPV6_RECVERR: no control group counts the queue of errors, and the C library insists on it for DNS.
TCP_DEFER_ACCEPT: a connection stays half-open for hours when its other side has gone without a word."""

OPTIONS: Mapping[int, frozenset[int]] = {
    # REUSEADDR TYPE ERROR DONTROUTE BROADCAST SNDBUF KEEPALIVE OOBINLINE NO_CHECK PRIORITY LINGER REUSEPORT PASSCRED
    # SNDLOWAT RCVTIMEO SNDTIMEO BINDTODEVICE TIMESTAMP PASSSEC TIMESTAMPNS RXQ_OVFL PEEK_OFF
    # MAX_PACING_RATE INCOMING_CPU and the variants with 64-bit times, PASSPIDFD
    _SOL_SOCKET: frozenset({
        2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 15, 16, 19, 20, 21, 25, 29, 34, 35, 40, 42, 47, 49,
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
    # SEGMENT GRO
    _SOL_UDP: frozenset({103, 104}),
    # 2292PKTINFO 2292HOPLIMIT FLOWINFO UNICAST_HOPS MULTICAST_IF MULTICAST_HOPS MULTICAST_LOOP DROP_MEMBERSHIP
    # MTU_DISCOVER MTU V6ONLY MULTICAST_ALL RECVERR_RFC4884 FLOWINFO_SEND RECVPKTINFO RECVHOPLIMIT RECVPATHMTU
    # DONTFRAG RECVTCLASS TCLASS AUTOFLOWLABEL ADDR_PREFERENCES RECVORIGDSTADDR UNICAST_IF FREEBIND
    _SOL_IPV6: frozenset({
        2, 8, 11, 16, 17, 18, 19, 21, 23, 24, 26, 29, 31, 33, 49, 51, 60, 62, 66, 67, 70, 72, 74, 76, 78,
    }),
    # ADD_MEMBERSHIP DROP_MEMBERSHIP PKTINFO NO_ENOBUFS CAP_ACK EXT_ACK GET_STRICT_CHK
    _SOL_NETLINK: frozenset({1, 2, 3, 5, 10, 11, 12}),
}  # fmt: skip
"""By level. Left out, among others: filters (SO_ATTACH_FILTER and its kin), UDP_CORK, memberships of IPv6 and of
sources (no bound for each socket), flow labels, SO_TIMESTAMPING (queues what was sent), SO_RESERVE_MEM, SO_RCVLOWAT,
TCP_ULP, TCP_MD5SIG, TCP_REPAIR. SO_ZEROCOPY: what arrives is then in pages that TCP_ZEROCOPY_RECEIVE can map.
IP_MINTTL, IPV6_MINHOPCOUNT: a socket that drops answers unseen keeps the other side's connection half-open for hours.
"""

TCP_LEVEL, TCP_ZEROCOPY_RECEIVE = _SOL_TCP, 35
"""An option that is asked for: maps pages of received data into the program. No control group is charged for them."""
