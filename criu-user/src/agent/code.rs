//! The agent's code: assembly that needs no stack, no library and nobody's help to come home.
//!
//! Two pieces share one loop (`run`): the *guest*, which enters a running process during a dump, and the *crew* loop,
//! of which a process consists while it is being restored. Registers, in both:
//!
//! | register | holds |
//! | --- | --- |
//! | r12 | address of the area: header, records, data |
//! | r13 | guest: our end of the socket |
//! | rbx, rbp | record at hand, records left |
//! | r14 | flags of the record |
//! | r15 | area of a task that the record creates |
//!
//! Area header: 0 socket pair (guest) or turn word (crew) · 8 this area is a copy's, which never goes home (guest) ·
//! 16 records left · 24 offset of the first record · 40 this area is a further thread's (guest) · 48 expected parent
//! (crew) · 64 the control message that brought one or two descriptors from the engine (guest); all zero without one.
//!
//! A further thread of a process shares nothing with the first: it makes an area of its own, without any records until
//! the engine has put them there, and takes it away again. So each comes home by itself, wherever the engine dies.

use std::arch::global_asm;

/// Size of the guest's code and data together.
pub fn guest_len() -> usize {
    bytes(&raw const criu_guest_start, &raw const criu_guest_end).len()
}

/// The guest's code and data as built, with all data zero.
pub fn guest() -> &'static [u8] {
    bytes(&raw const criu_guest_start, &raw const criu_guest_end)
}

/// The crew loop.
pub fn crew() -> &'static [u8] {
    bytes(&raw const criu_crew_start, &raw const criu_crew_end)
}

fn bytes(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both symbols bound one piece of this program's text, which is never written.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// Offsets within the guest.
#[derive(Debug, Clone, Copy)]
pub struct GuestLayout {
    /// Where a further thread enters.
    pub thread_entry: usize,
    /// After the call that makes its area.
    pub thread_area: usize,
    /// After the call that takes its area away.
    pub thread_unmap: usize,
    /// After the call that makes the socket pair.
    pub after_socketpair: usize,
    /// After the call that gives the first thread its processors back.
    pub processors_back: usize,
    /// After the last call on the way home of the first thread.
    pub home: usize,
    /// After the last call on the way home of a further thread.
    pub thread_home: usize,
    /// Size of the area; eight bytes.
    pub size: usize,
    /// Bytes of the processors that the first thread is given back, eight bytes, and these; 0 for none.
    pub processors: usize,
    /// The first thread's [`Home`].
    pub home_data: usize,
    /// The further thread's [`Home`].
    pub thread_home_data: usize,
}

impl GuestLayout {
    /// The last two calls on the way home of the first thread, in a guest at this address: after each.
    pub fn way_home(&self, code: u64) -> [u64; 2] {
        [self.processors_back, self.home].map(|at| code + at as u64)
    }

    /// The same of a further thread.
    pub fn thread_way_home(&self, code: u64) -> [u64; 2] {
        [self.thread_unmap, self.thread_home].map(|at| code + at as u64)
    }
}

/// Where things are in the guest.
pub fn guest_layout() -> GuestLayout {
    let start = &raw const criu_guest_start as usize;
    GuestLayout {
        thread_entry: &raw const criu_guest_thread as usize - start,
        thread_area: &raw const criu_guest_thread_area as usize - start,
        thread_unmap: &raw const criu_guest_thread_unmap as usize - start,
        after_socketpair: &raw const criu_guest_socketpair_done as usize - start,
        processors_back: &raw const criu_guest_processors_back as usize - start,
        home: &raw const criu_guest_home_done as usize - start,
        thread_home: &raw const criu_guest_thread_home_done as usize - start,
        size: &raw const criu_guest_size as usize - start,
        processors: &raw const criu_guest_processors as usize - start,
        home_data: &raw const criu_guest_home_data as usize - start,
        thread_home_data: &raw const criu_guest_thread_home_data as usize - start,
    }
}

/// What a thread is given back on its way home, in the order in which the assembly expects it.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Home {
    flags: u64,
    mask: u64,
    /// rax rbx rcx rdx rsi rdi rbp rsp r8 … r15 rip
    regs: [u64; 17],
}

impl Home {
    /// From registers that resume by themselves and the blocked signals.
    pub fn new(regs: &libc::user_regs_struct, mask: u64) -> Self {
        Self {
            flags: regs.eflags,
            mask,
            regs: [
                regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rbp, regs.rsp, regs.r8, regs.r9,
                regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15, regs.rip,
            ],
        }
    }

    /// As the bytes that stand in the guest.
    pub fn bytes(&self) -> Vec<u8> {
        [self.flags, self.mask].iter().chain(&self.regs).flat_map(|w| w.to_le_bytes()).collect()
    }
}

// SAFETY: symbols of the assembly below, only their addresses are used.
unsafe extern "C" {
    static criu_guest_start: u8;
    static criu_guest_thread: u8;
    static criu_guest_thread_area: u8;
    static criu_guest_thread_unmap: u8;
    static criu_guest_socketpair_done: u8;
    static criu_guest_processors_back: u8;
    static criu_guest_home_done: u8;
    static criu_guest_thread_home_done: u8;
    static criu_guest_size: u8;
    static criu_guest_processors: u8;
    static criu_guest_home_data: u8;
    static criu_guest_thread_home_data: u8;
    static criu_guest_end: u8;
    static criu_crew_start: u8;
    static criu_crew_end: u8;
}

global_asm!(
    r#"
.macro criu_arg index, reg
    mov \reg, [rbx + 8 + 8 * \index]
    bt r14d, 8 + 2 * \index
    jnc 11f
    mov \reg, [r12 + \reg]              // a value that an earlier call left in the area
    jmp 12f
11: bt r14d, 9 + 2 * \index
    jnc 12f
    add \reg, r12                       // a place in the area
12:
.endm

// Runs the records of the area; a task created by one of them goes on at \serve with its own area.
.macro criu_run serve
    mov rbx, [r12 + 24]
    add rbx, r12
    mov rbp, [r12 + 16]
1:  test rbp, rbp
    jz 3f
    mov r14, [rbx + 56]
    criu_arg 0, rdi
    criu_arg 1, rsi
    criu_arg 2, rdx
    criu_arg 3, r10
    criu_arg 4, r8
    criu_arg 5, r9
    mov r15, [rbx + 64]
    mov rax, [rbx]
    syscall
    test r14b, 2
    jz 2f
    test rax, rax
    jnz 2f
    mov r12, r15
    jmp \serve
2:  mov [rbx + 64], rax
    cmp rax, -4095
    jb 4f
    test r14b, 1
    jz 3f
4:  add rbx, 72
    dec rbp
    jmp 1b
3:  mov [r12 + 16], rbp
.endm

// Gives flags, stack pointer, signal mask and registers back and jumps home. Moves change no flags; the stack pointer
// is the program's own again before signals can come.
.macro criu_go_home data, done
    lea rsp, [rip + \data]
    popfq
    mov rsp, [rip + \data + 72]
    mov eax, 14                         // rt_sigprocmask(SIG_SETMASK, mask)
    mov edi, 2
    lea rsi, [rip + \data + 8]
    mov edx, 0
    mov r10d, 8
    syscall
\done:
    mov rax, [rip + \data + 16]
    mov rbx, [rip + \data + 24]
    mov rcx, [rip + \data + 32]
    mov rdx, [rip + \data + 40]
    mov rsi, [rip + \data + 48]
    mov rdi, [rip + \data + 56]
    mov rbp, [rip + \data + 64]
    mov r8,  [rip + \data + 80]
    mov r9,  [rip + \data + 88]
    mov r10, [rip + \data + 96]
    mov r11, [rip + \data + 104]
    mov r12, [rip + \data + 112]
    mov r13, [rip + \data + 120]
    mov r14, [rip + \data + 128]
    mov r15, [rip + \data + 136]
    jmp qword ptr [rip + \data + 144]
.endm

.macro criu_block_signals
    mov eax, 14                         // rt_sigprocmask(SIG_SETMASK, all)
    mov edi, 2
    lea rsi, [rip + criu_guest_all_signals]
    xor edx, edx
    mov r10d, 8
    syscall
.endm

.irp symbol, guest_start, guest_thread, guest_thread_area, guest_thread_unmap, guest_socketpair_done, guest_processors_back, guest_home_done, guest_thread_home_done, guest_size, guest_processors, guest_home_data, guest_thread_home_data, guest_end, crew_start, crew_end
    .globl criu_\symbol                  // other units of this program refer to them
    .hidden criu_\symbol
.endr

.pushsection .text.criu_agent, "ax"
.balign 16
criu_guest_start:
    criu_block_signals
    mov eax, 319                        // memfd_create("criu-ebpf", MFD_CLOEXEC)
    lea rdi, [rip + criu_guest_name]
    mov esi, 1
    syscall
    test eax, eax
    js 97f
    mov r14d, eax
    mov eax, 77                         // ftruncate
    mov edi, r14d
    mov rsi, [rip + criu_guest_size]
    syscall
    test eax, eax
    js 96f
    mov eax, 9                          // mmap(0, size, READ|WRITE, SHARED, memfd, 0)
    xor edi, edi
    mov rsi, [rip + criu_guest_size]
    mov edx, 3
    mov r10d, 1
    mov r8d, r14d
    xor r9d, r9d
    syscall
    cmp rax, -4096
    ja 96f
    mov r12, rax
    mov eax, 53                         // socketpair(UNIX, SEQPACKET|CLOEXEC)
    mov edi, 1
    mov esi, 0x80005
    xor edx, edx
    mov r10, r12
    syscall
criu_guest_socketpair_done:             // the engine takes the far end and the memfd here
    mov r15d, eax
    mov eax, 3                          // close(memfd)
    mov edi, r14d
    syscall
    test r15d, r15d
    js 95f
    mov r13d, [r12]
    mov eax, 3                          // close(far end): from here on, end of file means that the engine is gone
    mov edi, [r12 + 4]
    syscall
90: xor eax, eax                        // read(socket, header, 16)
    mov edi, r13d
    lea rsi, [r12 + 16]
    mov edx, 16
    syscall
    cmp rax, 16
    jne 94f
91: criu_run 89f
    cmp dword ptr [r12 + 40], 0
    jne 98f
    mov eax, 44                         // sendto(socket, header, 16, NOSIGNAL): no SIGPIPE for the program
    mov edi, r13d
    lea rsi, [r12 + 16]
    mov edx, 16
    mov r10d, 0x4000
    xor r8d, r8d
    xor r9d, r9d
    syscall
    jmp 90b
89: mov r13d, [r12]                     // a copy of the process begins here, with a batch and a socket of its own
    jmp 91b
94: cmp dword ptr [r12 + 8], 0          // and ends here: home is its original's
    jne 99f
    cmp qword ptr [r12 + 64], 0         // what the engine has lent: a descriptor,
    je 93f
    mov eax, 3                          // close
    mov edi, [r12 + 80]
    syscall
    mov edi, [r12 + 84]                 // and perhaps another, whose number is the higher one
    test edi, edi
    jz 93f
    mov eax, 3                          // close
    syscall
93: mov eax, 3                          // close(socket)
    mov edi, r13d
    syscall
95: mov eax, 11                         // munmap(area)
    mov rdi, r12
    mov rsi, [rip + criu_guest_size]
    syscall
    jmp 97f
96: mov eax, 3                          // close(memfd)
    mov edi, r14d
    syscall
97: mov esi, [rip + criu_guest_processors]
    test esi, esi
    jz 92f
    mov eax, 203                        // sched_setaffinity(0, bytes, processors)
    xor edi, edi
    lea rdx, [rip + criu_guest_processors + 8]
    syscall
criu_guest_processors_back:
92: criu_go_home criu_guest_home_data, criu_guest_home_done

criu_guest_thread:
    criu_block_signals
    mov eax, 9                          // mmap(0, size, READ|WRITE, PRIVATE|ANONYMOUS, -1, 0)
    xor edi, edi
    mov esi, {thread_area}
    mov edx, 3
    mov r10d, 0x22
    or r8, -1
    xor r9d, r9d
    syscall
criu_guest_thread_area:                 // the engine puts the records in here
    cmp rax, -4096
    ja 88f
    mov r12, rax
    mov byte ptr [r12 + 40], 1
    jmp 91b
98: mov eax, 11                         // munmap(area): the engine reads the results before it
    mov rdi, r12
    mov esi, {thread_area}
    syscall
criu_guest_thread_unmap:
88: criu_go_home criu_guest_thread_home_data, criu_guest_thread_home_done
99: mov eax, 231                        // exit_group
    xor edi, edi
    syscall
    ud2                                 // whatever a filter makes of that

criu_guest_name:
    .asciz "criu-ebpf"
.balign 8
criu_guest_all_signals:
    .quad -1
criu_guest_size:
    .quad 0
criu_guest_processors:
    .quad 0
    .zero {processors}
criu_guest_home_data:
    .zero 152
criu_guest_thread_home_data:
    .zero 152
criu_guest_end:

.balign 16
criu_crew_start:
    // The processor enters with r12 set to the area.
90: mov eax, [r12]                      // the turn word: 1 is ours, 0 is the engine's
    test eax, eax
    jnz 91f
    mov eax, 202                        // futex(turn, WAIT, 0, one second)
    mov rdi, r12
    xor esi, esi
    xor edx, edx
    lea r10, [rip + criu_crew_second]
    syscall
    cmp rax, -110
    jne 90b
    mov eax, 110                        // getppid: without the engine there is nobody to wait for
    syscall
    cmp eax, [r12 + 48]
    je 90b
    mov eax, 231                        // exit_group
    mov edi, 1
    syscall
91: criu_run 90b
    xor eax, eax
    xchg [r12], eax
    mov eax, 202                        // futex(turn, WAKE, 1)
    mov rdi, r12
    mov esi, 1
    mov edx, 1
    syscall
    jmp 90b
.balign 8
criu_crew_second:
    .quad 1
    .quad 0
criu_crew_end:
.popsection
"#,
    thread_area = const super::guest::THREAD_AREA,
    processors = const super::beside::PROCESSORS,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_fits_into_the_spare_bytes_of_a_vdso() {
        assert!(guest_len() <= 1500, "{} bytes", guest_len());
    }

    #[test]
    fn home_data_has_the_size_that_the_assembly_reserves() {
        let layout = guest_layout();
        assert_eq!(size_of::<Home>(), layout.thread_home_data - layout.home_data);
        assert_eq!(guest()[layout.home_data..], [0; 2 * size_of::<Home>()]);
        assert_eq!(layout.home_data - layout.processors, 8 + super::super::beside::PROCESSORS);
    }
}
