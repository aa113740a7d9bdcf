//! The registers of a thread: general ones and the processor's extended state.
//!
//! The image has the components of the extended state one by one; the kernel takes and gives them as one XSAVE area
//! (Intel SDM volume 1, 13.4). The first 576 bytes, legacy area and header, have a fixed layout; where the further
//! components lie is the processor's to say.

use libc::user_regs_struct;

use super::ObjectError;
use crate::image::proto::{UserX86FpregsEntry, UserX86RegsEntry, UserX86XsaveEntry};
use crate::kernel::xsave;

const HEADER: usize = 512;
const EXTENDED: usize = 576;
/// Where the kernel and ptrace keep the set of enabled components: the software-reserved bytes of the legacy area.
const XCR0: usize = 464;

const YMM: usize = 2;
const BNDREGS: usize = 3;
const BNDCSR: usize = 4;
const OPMASK: usize = 5;
const ZMM_UPPER: usize = 6;
const HI16_ZMM: usize = 7;
const PKRU: usize = 9;

/// General registers as the image has them.
pub fn general(r: &user_regs_struct) -> UserX86RegsEntry {
    UserX86RegsEntry {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.rbp,
        bx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.rax,
        cx: r.rcx,
        dx: r.rdx,
        si: r.rsi,
        di: r.rdi,
        orig_ax: r.orig_rax,
        ip: r.rip,
        cs: r.cs,
        flags: r.eflags,
        sp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        mode: None,
    }
}

/// General registers as ptrace takes them.
pub fn to_general(e: &UserX86RegsEntry) -> user_regs_struct {
    user_regs_struct {
        r15: e.r15,
        r14: e.r14,
        r13: e.r13,
        r12: e.r12,
        rbp: e.bp,
        rbx: e.bx,
        r11: e.r11,
        r10: e.r10,
        r9: e.r9,
        r8: e.r8,
        rax: e.ax,
        rcx: e.cx,
        rdx: e.dx,
        rsi: e.si,
        rdi: e.di,
        orig_rax: e.orig_ax,
        rip: e.ip,
        cs: e.cs,
        eflags: e.flags,
        rsp: e.sp,
        ss: e.ss,
        fs_base: e.fs_base,
        gs_base: e.gs_base,
        ds: e.ds,
        es: e.es,
        fs: e.fs,
        gs: e.gs,
    }
}

fn words<const N: usize, T>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
    bytes
        .chunks_exact(N)
        .map(|chunk| {
            let mut word = [0; N];
            word.copy_from_slice(chunk);
            from(word)
        })
        .collect()
}

fn u16_at(b: &[u8], at: usize) -> u32 {
    u16::from_le_bytes([b[at], b[at + 1]]).into()
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

/// Extended state as the image has it, from an XSAVE area.
pub fn extended(area: &[u8]) -> UserX86FpregsEntry {
    let mut legacy = [0u8; HEADER];
    let n = area.len().min(HEADER);
    legacy[..n].copy_from_slice(&area[..n]);
    UserX86FpregsEntry {
        cwd: u16_at(&legacy, 0),
        swd: u16_at(&legacy, 2),
        twd: u16_at(&legacy, 4),
        fop: u16_at(&legacy, 6),
        rip: u64_at(&legacy, 8),
        rdp: u64_at(&legacy, 16),
        mxcsr: u32_at(&legacy, 24),
        mxcsr_mask: u32_at(&legacy, 28),
        st_space: words(&legacy[32..160], u32::from_le_bytes),
        xmm_space: words(&legacy[160..416], u32::from_le_bytes),
        padding: Vec::new(),
        xsave: (area.len() >= EXTENDED).then(|| xsave_components(area)),
    }
}

fn component(area: &[u8], n: usize) -> &[u8] {
    let place = xsave::components()[n];
    area.get(place.offset..place.offset + place.len).unwrap_or_default()
}

fn xsave_components(area: &[u8]) -> UserX86XsaveEntry {
    UserX86XsaveEntry {
        xstate_bv: u64_at(area, HEADER),
        ymmh_space: words(component(area, YMM), u32::from_le_bytes),
        bndreg_state: words(component(area, BNDREGS), u64::from_le_bytes),
        bndcsr_state: words(component(area, BNDCSR), u64::from_le_bytes),
        opmask_reg: words(component(area, OPMASK), u64::from_le_bytes),
        zmm_upper: words(component(area, ZMM_UPPER), u64::from_le_bytes),
        hi16_zmm: words(component(area, HI16_ZMM), u64::from_le_bytes),
        // The component is 8 bytes long, of which the register is the first half.
        pkru: words(component(area, PKRU), u32::from_le_bytes),
        cet: None,
    }
}

/// An XSAVE area as ptrace takes it, for this processor.
pub fn to_extended(e: &UserX86FpregsEntry) -> Result<Vec<u8>, ObjectError> {
    let places = xsave::components();
    let len = places.iter().map(|p| p.offset + p.len).max().unwrap_or(0).max(EXTENDED);
    let mut area = vec![0u8; len];
    let mut put = |at: usize, bytes: &[u8]| area[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(e.cwd as u16).to_le_bytes());
    put(2, &(e.swd as u16).to_le_bytes());
    put(4, &(e.twd as u16).to_le_bytes());
    put(6, &(e.fop as u16).to_le_bytes());
    put(8, &e.rip.to_le_bytes());
    put(16, &e.rdp.to_le_bytes());
    put(24, &e.mxcsr.to_le_bytes());
    put(28, &e.mxcsr_mask.to_le_bytes());
    for (i, word) in e.st_space.iter().take(32).enumerate() {
        put(32 + 4 * i, &word.to_le_bytes());
    }
    for (i, word) in e.xmm_space.iter().take(64).enumerate() {
        put(160 + 4 * i, &word.to_le_bytes());
    }
    let mut present = 3u64;
    if let Some(x) = &e.xsave {
        present = x.xstate_bv;
        let wide = |v: &[u64]| v.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let narrow = |v: &[u32]| v.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
        let mut known = 3u64;
        for (n, bytes) in [
            (YMM, narrow(&x.ymmh_space)),
            (BNDREGS, wide(&x.bndreg_state)),
            (BNDCSR, wide(&x.bndcsr_state)),
            (OPMASK, wide(&x.opmask_reg)),
            (ZMM_UPPER, wide(&x.zmm_upper)),
            (HI16_ZMM, wide(&x.hi16_zmm)),
            (PKRU, narrow(&x.pkru)),
        ] {
            let place = places[n];
            if present & 1 << n != 0 && place.len == 0 {
                return Err(ObjectError::Unsupported {
                    what: format!("register state {n} (XSAVE numbering), which this processor lacks"),
                    advice: "restore on a machine with at least the features of the one of the dump",
                });
            }
            let len = place.len.min(bytes.len());
            put(place.offset, &bytes[..len]);
            known |= u64::from(place.len > 0) << n;
        }
        present &= known;
    }
    put(HEADER, &present.to_le_bytes());
    put(XCR0, &present.to_le_bytes());
    Ok(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_extended_state_survives_the_image() {
        let places = xsave::components();
        let len = places.iter().map(|p| p.offset + p.len).max().unwrap_or(0).max(EXTENDED);
        let mut area: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        // What is neither register nor header is not carried over.
        area[416..EXTENDED].fill(0);
        let present =
            3 | [YMM, OPMASK, ZMM_UPPER, HI16_ZMM].iter().filter(|&&n| places[n].len > 0).fold(0u64, |b, n| b | 1 << n);
        area[HEADER..HEADER + 8].copy_from_slice(&present.to_le_bytes());
        let back = to_extended(&extended(&area)).expect("same processor");
        assert_eq!(back[..416], area[..416]);
        assert_eq!(back[HEADER..HEADER + 8], area[HEADER..HEADER + 8]);
        for n in [YMM, OPMASK, ZMM_UPPER, HI16_ZMM] {
            assert_eq!(component(&back, n), component(&area, n), "component {n}");
        }
    }
}
