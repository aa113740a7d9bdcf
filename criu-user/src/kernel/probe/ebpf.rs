//! eBPF: the engine's own iterators, and for everything else a program of two instructions that is loaded, attached, and
//! gone again with its descriptors.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Instant;

use aya_obj::generated::{bpf_attach_type as attach, bpf_cmd as cmd, bpf_map_type as map, bpf_prog_type as kind};
use nix::sched::CloneFlags;
use nix::unistd::Pid;

use super::{Absent, Answer, apart_in, network};
use crate::kernel::ebpf::admit::Door;
use crate::kernel::ebpf::latch::Latch;
use crate::kernel::ebpf::pending::{Reader, Which};
use crate::kernel::ebpf::touched::Lookout;
use crate::kernel::ebpf::{EbpfError, EbpfSurvey, bpf, btf, numbers};
use crate::kernel::scratch;

/// Whose probe's fault it is, for [`EbpfError::Call`].
fn failed(on: &str) -> impl FnOnce((&'static str, std::io::Error)) -> EbpfError {
    let on = on.to_owned();
    move |(command, source)| EbpfError::Call { command, on, source }
}

/// The kernel describes its types.
pub fn type_information() -> Answer {
    let (types, _) = btf::ids(&[])?;
    Ok(format!("{types} types in {}", btf::VMLINUX))
}

/// The survey's iterators are loaded, and asked about this process.
pub fn iterators() -> Answer {
    let begin = Instant::now();
    let mut survey = EbpfSurvey::new()?;
    survey.load_all()?;
    let loaded = begin.elapsed();
    let areas = survey.vmas_of(Pid::this())?.len();
    let files = survey.files_of(Pid::this())?.len();
    let threads = survey.tasks_of(Pid::this())?.map_or(0, |tasks| tasks.threads.len());
    let ms = loaded.as_secs_f64() * 1e3;
    Ok(format!("task_vma, task_file, task: {areas} areas, {files} files, {threads} thread; loaded in {ms:.1} ms"))
}

/// A program that is to be loaded for a trial; `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log: [u64; 2],
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    debug: [u64; 4],
    line_info_cnt: u32,
    attach_btf_id: u32,
}

/// Loads `return 0`; `attach` is 0 where the type of program says enough.
fn load(kind: kind, attach: u32, btf_id: u32) -> Result<OwnedFd, EbpfError> {
    /// `r0 = 0; exit`.
    const CODE: [u64; 2] = [0xb7, 0x95];
    let mut prog_name = [0; 16];
    prog_name[..10].copy_from_slice(b"criu_check");
    let load = Load {
        prog_type: kind as u32,
        insn_cnt: CODE.len() as u32,
        insns: CODE.as_ptr().expose_provenance() as u64,
        license: c"GPL".as_ptr().expose_provenance() as u64,
        prog_name,
        expected_attach_type: attach,
        attach_btf_id: btf_id,
        ..Load::default()
    };
    let command = (cmd::BPF_PROG_LOAD as i32, "BPF_PROG_LOAD");
    // SAFETY: code and licence outlive the call; it gives a new descriptor.
    unsafe { bpf::call(command, &load).map(|fd| bpf::owned(fd)) }.map_err(failed("a trial program"))
}

/// A tracing program is loaded for what `name` stands for in the kernel's BTF, and attached.
fn trace(attach: attach, name: &str) -> Answer {
    let (_, ids) = btf::ids(&[name])?;
    let id = ids.first().copied().flatten().ok_or_else(|| Absent::because(format!("the kernel has no {name}")))?;
    let program = load(kind::BPF_PROG_TYPE_TRACING, attach as u32, id)?;
    let command = (cmd::BPF_RAW_TRACEPOINT_OPEN as i32, "BPF_RAW_TRACEPOINT_OPEN");
    // SAFETY: the attribute is no name and a descriptor; it gives a new descriptor.
    unsafe { bpf::call(command, &[0, program.as_raw_fd() as u64]).map(|fd| bpf::owned(fd)) }.map_err(failed(name))?;
    Ok(String::new())
}

/// Tracepoints by BTF (tp_btf).
pub fn tracepoint() -> Answer {
    trace(attach::BPF_TRACE_RAW_TP, "btf_trace_sched_process_exit")
}

/// The entry of kernel functions (fentry), through trampolines.
pub fn function_entry() -> Answer {
    trace(attach::BPF_TRACE_FENTRY, "wake_up_new_task")
}

/// Makes a map of a page.
fn make_map(kind: map, key: u32, value: u32, entries: u32) -> Result<OwnedFd, EbpfError> {
    let command = (cmd::BPF_MAP_CREATE as i32, "BPF_MAP_CREATE");
    // SAFETY: the attribute is numbers alone; it gives a new descriptor.
    unsafe { bpf::call(command, &[kind as u32, key, value, entries]).map(|fd| bpf::owned(fd)) }
        .map_err(failed("a trial map"))
}

/// Ring buffers.
pub fn ring_buffer() -> Answer {
    make_map(map::BPF_MAP_TYPE_RINGBUF, 0, 0, 4096)?;
    Ok(String::new())
}

/// A classifier attached by tcx to the loopback device of a namespace of its own.
pub fn tcx() -> Answer {
    apart_in(CloneFlags::CLONE_NEWNET, || {
        let program = load(kind::BPF_PROG_TYPE_SCHED_CLS, attach::BPF_TCX_INGRESS as u32, 0)?;
        let command = (cmd::BPF_LINK_CREATE as i32, "BPF_LINK_CREATE");
        let attribute = [program.as_raw_fd() as u32, network::LO, attach::BPF_TCX_INGRESS as u32, 0];
        // SAFETY: the attribute is numbers alone; it gives a new descriptor.
        unsafe { bpf::call(command, &attribute).map(|fd| bpf::owned(fd)) }.map_err(failed("tcx on lo"))?;
        Ok(String::new())
    })
}

/// The same as a filter of traffic control, of which nothing is left.
pub fn clsact() -> Answer {
    apart_in(CloneFlags::CLONE_NEWNET, || {
        let program = load(kind::BPF_PROG_TYPE_SCHED_CLS, 0, 0)?;
        let latch = Latch::new(program.as_fd())?;
        latch.attach(&[network::LO])?;
        Ok(latch.remove().map(|()| String::new())?)
    })
}

/// The programs that look at TCP clients whom nobody has accepted, and those that bring them back.
pub fn pending_clients() -> Answer {
    const COOKIES: &str = "/proc/sys/net/ipv4/tcp_syncookies";
    Reader::new(&[], 0, Which::All)?.read()?;
    if std::fs::read_to_string(COOKIES).is_ok_and(|value| value.trim() == "0") {
        return Err(Absent::because(format!("{COOKIES} says 0")));
    }
    apart_in(CloneFlags::CLONE_NEWNET, || Ok(Door::new(&[]).map(|_| String::new())?))
}

/// The programs that find connections, and look after them.
pub fn connections_ahead() -> Answer {
    let lookout = Lookout::new(1)?;
    let found = lookout.connections(Pid::this())?.len();
    lookout.begin(&[])?.touched()?;
    numbers::Reader::new()?.read()?;
    Ok(format!("task, sys_exit, task_file: {found} connections"))
}

/// bpffs: something is pinned in one that is mounted nowhere and goes with its descriptor.
pub fn file_system() -> Answer {
    let mount = scratch::detached(c"bpf")?;
    let pinned = make_map(map::BPF_MAP_TYPE_ARRAY, 4, 4, 1)?;
    let path = CString::new(format!("/proc/self/fd/{}/check", mount.as_raw_fd())).unwrap_or_default();
    let command = (cmd::BPF_OBJ_PIN as i32, "BPF_OBJ_PIN");
    let attribute = [path.as_ptr().expose_provenance() as u64, pinned.as_raw_fd() as u64];
    // SAFETY: the path lives for the call.
    unsafe { bpf::call(command, &attribute) }.map_err(failed("a map in a bpffs"))?;
    Ok(String::new())
}
