//! Where tracked processes write: write faults by blocks of the size of a huge page, counted in a map of each processor.
//! A record goes out only for the first one in a block.
//!
//! A page that is present and writable is written without a fault, so this tells *when and where*, never *whether*: what
//! was written is known to PAGEMAP_SCAN alone.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, map};
use aya_ebpf::maps::PerCpuHashMap;
use aya_ebpf::programs::BtfTracePointContext;
use criu_common::watch::{BLOCK_SHIFT, Block, BlockKey, Faults, Loss, MOST_BLOCKS, Process, RecordKind};

use crate::tracked::{Wake, add, current, find, header, key_of, lost, send};

/// Without room set aside: most trees write in few blocks.
const BPF_F_NO_PREALLOC: u32 = 1;
const BPF_NOEXIST: u64 = 1;

/// Write faults by block.
#[map]
static FAULTS: PerCpuHashMap<BlockKey, Faults> = PerCpuHashMap::with_max_entries(MOST_BLOCKS, BPF_F_NO_PREALLOC);

/// Bits of the processor's error code (arch/x86/include/asm/trap_pf.h): the page was there; it was a write.
const PROTECTION: u64 = 1;
const WRITE: u64 = 2;

/// `page_fault_user(address, regs, error_code)`: by the program's own instructions.
#[btf_tracepoint(function = "page_fault_user")]
fn watch_fault_user(ctx: BtfTracePointContext) -> i32 {
    fault(&ctx)
}

/// `page_fault_kernel(address, regs, error_code)`: by a system call that writes into its memory.
#[btf_tracepoint(function = "page_fault_kernel")]
fn watch_fault_kernel(ctx: BtfTracePointContext) -> i32 {
    fault(&ctx)
}

#[inline(always)]
fn fault(ctx: &BtfTracePointContext) -> i32 {
    let (address, code): (u64, u64) = (ctx.arg(0), ctx.arg(2));
    // The kernel's own half has the highest bit.
    if code & WRITE == 0 || address >> 63 != 0 {
        return 0;
    }
    let task = current();
    // SAFETY: a typed pointer.
    let key = unsafe { key_of(task) };
    if let Some(process) = find(key) {
        note(process, key, address, (code & PROTECTION) as usize);
    }
    0
}

#[inline(always)]
fn note(process: &mut Process, key: u32, address: u64, protection: usize) {
    if protection != 0 {
        add(&mut process.write_faults[0], 1);
    } else {
        add(&mut process.write_faults[1], 1);
    }
    // SAFETY: no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let block = BlockKey { key, image: process.images, block: address >> BLOCK_SHIFT };
    if let Some(faults) = FAULTS.get_ptr_mut(block) {
        // SAFETY: a pointer into the map, not null, of this processor alone.
        let faults = unsafe { &mut *faults };
        if protection != 0 {
            faults.protected += 1;
        } else {
            faults.missing += 1;
        }
        faults.last_ns = now;
        return;
    }
    let first = Faults { protected: protection as u64, missing: 1 - protection as u64, last_ns: now };
    match FAULTS.insert(block, first, BPF_NOEXIST) {
        Ok(()) => {
            // SAFETY: the current task.
            let header = unsafe { header(RecordKind::Block, key, process.pid, current()) };
            send(Block { header, address: address >> BLOCK_SHIFT << BLOCK_SHIFT }, Loss::Block, Wake::Later);
        }
        // Another processor was first, or there is no room.
        Err(_) => lost(Loss::Fault),
    }
}
