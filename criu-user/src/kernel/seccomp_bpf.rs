//! What a seccomp filter would say of a system call: an interpreter for the classic BPF that seccomp(2) takes.
//!
//! A tracer can suspend a target's filters, but only as long as it lives (PTRACE_O_SUSPEND_SECCOMP). Whether the code
//! that then has to come home alone could, is asked here beforehand. The instructions are those that
//! `seccomp_check_filter` of kernel/seccomp.c lets pass; anything else counts as a refusal.

/// A filter: its instructions as `struct sock_filter`s, and its SECCOMP_FILTER_FLAG_*.
pub type Filter = (Vec<u8>, u32);

/// A call as a filter sees it: `struct seccomp_data`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Call {
    /// Its number.
    pub nr: i64,
    /// Its arguments.
    pub args: [u64; 6],
    /// Where it is made.
    pub address: u64,
}

/// What all filters of a thread together make of a call, from the mildest to the hardest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// It is made: SECCOMP_RET_ALLOW, SECCOMP_RET_LOG.
    Allowed,
    /// It returns an error: SECCOMP_RET_ERRNO.
    Fails,
    /// A signal, a tracer, a supervisor or death.
    Deadly,
}

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// What the thread with these filters would get for a call.
pub fn verdict(filters: &[Filter], call: &Call) -> Verdict {
    let data = call.bytes();
    filters.iter().map(|(code, _)| Verdict::of(run(code, &data))).max().unwrap_or(Verdict::Allowed)
}

impl Verdict {
    /// `SECCOMP_RET_*` of include/uapi/linux/seccomp.h; `None` for a program that makes no sense.
    fn of(returned: Option<u32>) -> Self {
        match returned.map(|value| value & 0xffff_0000) {
            Some(0x7fff_0000 | 0x7ffc_0000) => Self::Allowed,
            Some(0x0005_0000) => Self::Fails,
            _ => Self::Deadly,
        }
    }
}

impl Call {
    fn bytes(&self) -> [u8; 64] {
        let mut data = [0; 64];
        data[..4].copy_from_slice(&(self.nr as u32).to_le_bytes());
        data[4..8].copy_from_slice(&AUDIT_ARCH_X86_64.to_le_bytes());
        data[8..16].copy_from_slice(&self.address.to_le_bytes());
        for (arg, place) in self.args.iter().zip(data[16..].chunks_exact_mut(8)) {
            place.copy_from_slice(&arg.to_le_bytes());
        }
        data
    }
}

/// `struct sock_filter`.
struct Instruction {
    code: u16,
    jump_true: usize,
    jump_false: usize,
    k: u32,
}

impl Instruction {
    fn at(program: &[u8], index: usize) -> Option<Self> {
        let bytes = program.get(index * 8..index * 8 + 8)?;
        Some(Self {
            code: u16::from_le_bytes([bytes[0], bytes[1]]),
            jump_true: bytes[2].into(),
            jump_false: bytes[3].into(),
            k: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
    }
}

/// Runs a program. Jumps only go forwards, so it comes to its end.
fn run(program: &[u8], data: &[u8; 64]) -> Option<u32> {
    let (mut a, mut x, mut memory, mut at) = (0u32, 0u32, [0u32; 16], 0usize);
    loop {
        let ins = Instruction::at(program, at)?;
        at += 1;
        // Class in the lowest three bits; the operand is x with bit 3, else k (include/uapi/linux/bpf_common.h).
        let operand = if ins.code & 0x08 == 0 { ins.k } else { x };
        match ins.code {
            0x20 => a = word(data, ins.k)?,
            0x00 => a = ins.k,
            0x01 => x = ins.k,
            0x60 => a = *memory.get(ins.k as usize)?,
            0x61 => x = *memory.get(ins.k as usize)?,
            0x80 => a = 64,
            0x81 => x = 64,
            0x02 => *memory.get_mut(ins.k as usize)? = a,
            0x03 => *memory.get_mut(ins.k as usize)? = x,
            0x07 => x = a,
            0x87 => a = x,
            0x06 => return Some(ins.k),
            0x16 => return Some(a),
            0x05 => at = at.checked_add(ins.k as usize)?,
            code if code & 0x07 == 0x04 => a = compute(code, a, operand)?,
            code if code & 0x07 == 0x05 => at += if holds(code, a, operand)? { ins.jump_true } else { ins.jump_false },
            _ => return None,
        }
    }
}

fn word(data: &[u8; 64], offset: u32) -> Option<u32> {
    let bytes = data.get(offset as usize..)?.get(..4)?;
    Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn compute(code: u16, a: u32, operand: u32) -> Option<u32> {
    Some(match code & 0xf0 {
        0x00 => a.wrapping_add(operand),
        0x10 => a.wrapping_sub(operand),
        0x20 => a.wrapping_mul(operand),
        0x30 => a.checked_div(operand)?,
        0x40 => a | operand,
        0x50 => a & operand,
        0x60 => a.checked_shl(operand)?,
        0x70 => a.checked_shr(operand)?,
        0x80 => a.wrapping_neg(),
        0xa0 => a ^ operand,
        _ => return None,
    })
}

fn holds(code: u16, a: u32, operand: u32) -> Option<bool> {
    Some(match code & 0xf0 {
        0x10 => a == operand,
        0x20 => a > operand,
        0x30 => a >= operand,
        0x40 => a & operand != 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALLOW: u32 = 0x7fff_0000;
    const ERRNO: u32 = 0x0005_0000 | 77;
    const KILL: u32 = 0;

    fn program(instructions: &[(u16, u8, u8, u32)]) -> Filter {
        let one =
            |&(code, jt, jf, k): &(u16, u8, u8, u32)| [&code.to_le_bytes()[..], &[jt, jf], &k.to_le_bytes()].concat();
        (instructions.iter().flat_map(one).collect(), 0)
    }

    /// `number` gets one answer, everything else passes.
    fn about(number: u32, answer: u32) -> Filter {
        program(&[(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, answer), (0x06, 0, 0, ALLOW)])
    }

    #[test]
    fn the_hardest_of_several_filters_counts() {
        let filters = [about(3, ERRNO), about(0, KILL), about(3, ALLOW)];
        let of = |nr| verdict(&filters, &Call { nr, ..Call::default() });
        assert_eq!([of(3), of(0), of(11)], [Verdict::Fails, Verdict::Deadly, Verdict::Allowed]);
        assert_eq!(verdict(&[], &Call::default()), Verdict::Allowed);
    }

    #[test]
    fn arguments_are_seen() {
        // The third argument, lower half, with bit 2 (PROT_EXEC) set.
        let filter = [program(&[(0x20, 0, 0, 32), (0x45, 0, 1, 4), (0x06, 0, 0, KILL), (0x06, 0, 0, ALLOW)])];
        let of = |prot| verdict(&filter, &Call { nr: 9, args: [0, 0, prot, 0, 0, 0], address: 0 });
        assert_eq!([of(3), of(7)], [Verdict::Allowed, Verdict::Deadly]);
    }

    #[test]
    fn arithmetic_and_memory() {
        let add_and_compare = [
            (0x00, 0, 0, 40),
            (0x04, 0, 0, 2),
            (0x02, 0, 0, 15),
            (0x01, 0, 0, 6),
            (0x60, 0, 0, 15),
            (0x3c, 0, 0, 0),
            (0x15, 0, 1, 7),
            (0x06, 0, 0, ALLOW),
            (0x06, 0, 0, KILL),
        ];
        assert_eq!(verdict(&[program(&add_and_compare)], &Call::default()), Verdict::Allowed);
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(code in proptest::collection::vec(any::<u8>(), 0..512), nr in 0i64..500) {
            verdict(&[(code, 0)], &Call { nr, ..Call::default() });
        }
    }
}
