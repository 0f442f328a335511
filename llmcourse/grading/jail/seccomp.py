"""A filter of system calls: what no answer needs and what has opened jails before is refused.

Refused with EPERM: tracing other processes, mounts, new namespaces, kernel modules, BPF, io_uring, keys, memory that
no limit counts (`memfd_create`, shared anonymous mappings, System V and POSIX queues), the clock. `clone3`, whose
flags a filter cannot see, and calls newer than this list do not exist (ENOSYS): the C library then takes the older one.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
import sys

from llmcourse.grading.jail.system_calls import AARCH64, MACHINE, X86_64, raw_call

# name: number on x86_64, on aarch64; None where it has none
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semctl": (66, 191),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "vhangup": (153, 58),
    "personality": (135, 92),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "vmsplice": (278, 75),
    "lookup_dcookie": (212, 18),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "sysfs": (139, None),
}
# Refused too where only Landlock stands: there the files and processes outside are this user's own, and Landlock does
# not cover their rights, times and limits, nor (before its sixth version) signals.
_REFUSED_WITHOUT_NAMESPACES: dict[str, tuple[int | None, int | None]] = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
}
_COLUMN = {X86_64: 0, AARCH64: 1}
_ARCHITECTURE = {X86_64: 0xC000003E, AARCH64: 0xC00000B7}
_CLONE, _SOCKET, _LIMIT, _CLONE3, _LAST_KNOWN = (56, 220), (41, 198), (302, 261), 435, 461
_MMAP, _FCNTL, _IOCTL, _SOCKETPAIR = (9, 222), (72, 25), (16, 29), (53, 199)
_SHARED_ANONYMOUS = 0x21
"""memory that RLIMIT_DATA does not count, and that may be there without being resident"""
_SIGNAL_OTHERS = {_FCNTL: (8, 10, 15), _IOCTL: (0x8901, 0x8902)}
"""F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP: the kernel then signals any process of this user"""
_NEW_NAMESPACES = 0x7E020000
_SET_FILTER = 1
# Of a BPF program: load a word, jump if equal, greater, or any bit set, keep some bits, return.
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x54, 0x06
_KILL, _ALLOW, _ERROR = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT, _SECOND_ARGUMENT_AT = 0, 4, 16, 24
_THIRD_ARGUMENT_AT, _FOURTH_ARGUMENT_AT = 32, 40
_NETLINK = 16


def supported() -> bool:
    """Whether the filter knows this machine's system calls."""
    return MACHINE in _COLUMN and sys.byteorder == "little"


def build(inside: bool) -> bytes:
    """The filter as a BPF program.

    Args:
        inside: whether it is for the inside of namespaces: Internet and Unix sockets, which lead nowhere there, are
            then allowed; elsewhere no sockets at all, nor what would reach this user's other files and processes.
    """
    column = _COLUMN[MACHINE]
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6) if inside else ()
    names = _REFUSED if inside else _REFUSED | _REFUSED_WITHOUT_NAMESPACES
    refused = [numbers[column] for numbers in names.values() if numbers[column] is not None]
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURE[MACHINE]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_GREATER, 0, 1, _LAST_KNOWN),  # the other numbering of x86_64 too
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]
    for number in refused:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    program += [
        (_EQUAL, 0, 5, _MMAP[column]),
        (_LOAD, 0, 0, _FOURTH_ARGUMENT_AT),
        (_AND, 0, 0, _SHARED_ANONYMOUS),
        (_EQUAL, 0, 1, _SHARED_ANONYMOUS),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    if not inside:
        program += _not_to_others(column)
    program += [
        (_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 4, _LIMIT[column]),  # prlimit: of oneself alone
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
        (_EQUAL, 0, 2 * len(families) + (6 if inside else 2), _SOCKET[column]),
        (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
    ]
    for family in families:
        program += [(_EQUAL, 0, 1, int(family)), (_RETURN, 0, 0, _ALLOW)]
    if inside:  # the list of network interfaces, which torch's process groups ask for
        program += [
            (_EQUAL, 0, 3, _NETLINK),
            (_LOAD, 0, 0, _THIRD_ARGUMENT_AT),
            (_EQUAL, 0, 1, 0),
            (_RETURN, 0, 0, _ALLOW),
        ]
    program += [(_RETURN, 0, 0, _ERROR | errno.EAFNOSUPPORT), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _not_to_others(column: int) -> list[tuple[int, int, int, int]]:
    """No signals to other processes by way of files, and no datagrams to sockets that have a name."""
    program = []
    for call, commands in _SIGNAL_OTHERS.items():
        program += [(_EQUAL, 0, 2 * len(commands) + 2, call[column]), (_LOAD, 0, 0, _SECOND_ARGUMENT_AT)]
        for command in commands:
            program += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
        program += [(_RETURN, 0, 0, _ALLOW)]
    return [
        *program,
        (_EQUAL, 0, 5, _SOCKETPAIR[column]),
        (_LOAD, 0, 0, _SECOND_ARGUMENT_AT),
        (_AND, 0, 0, 0xF),
        (_EQUAL, 1, 0, int(socket.SOCK_STREAM)),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]


def install(program: bytes) -> None:
    """Put the filter on this process and all its future children, for good. Needs "no new privileges" to be set.

    Raises:
        OSError: the kernel refused.
    """
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)), 16
    )
    raw_call("seccomp", _SET_FILTER, 0, header)
