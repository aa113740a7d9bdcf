//! The kernel's own description of its types (BTF): where fields are, and the ids of functions.
//!
//! The format is documented in Documentation/bpf/btf.rst. aya has a parser, which makes an object of every one of some
//! 150 000 types and takes 14 to 22 ms for it; this one walks over the bytes once, keeps what was asked for, and takes
//! about a tenth. It reads a file of the kernel's, yet trusts no number in it.

use std::fs;

use criu_common::offsets::{ABSENT, Offsets, Source};

use super::{EbpfError, EbpfResult};

/// Where the kernel shows it.
pub const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;
/// Deepest nesting of structs that is followed: the kernel's is below ten.
const MAX_DEPTH: u32 = 32;

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const TYPEDEF: u32 = 8;
const CONST_LIKE: [u32; 5] = [TYPEDEF, 9, 10, 11, 18];
const FUNC: u32 = 12;

/// What a program needs to know of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// A value for each field, in the order in which they were asked for.
    pub offsets: Vec<u32>,
    /// BTF ids of functions, such as those that stand for iterators, in the order in which they were asked for.
    pub functions: Vec<u32>,
}

impl Layout {
    /// Looks everything up in the running kernel.
    pub fn of_this_kernel(sources: &[Source], functions: &[&str]) -> EbpfResult<Self> {
        let bytes = fs::read(VMLINUX).map_err(|source| EbpfError::NoBtf { path: VMLINUX, source })?;
        Self::from_btf(&bytes, sources, functions)
    }

    /// Looks everything up in `bytes`.
    pub fn from_btf(bytes: &[u8], sources: &[Source], functions: &[&str]) -> EbpfResult<Self> {
        let btf = Btf::scan(bytes, &structs_of(sources), functions)?;
        let offsets = btf.offsets(sources)?;
        let find = |name: &&str| {
            let found = btf.functions.iter().find(|(known, _)| known == name).map(|(_, id)| *id);
            found.ok_or_else(|| EbpfError::Missing { what: format!("function `{name}`") })
        };
        Ok(Self { offsets, functions: functions.iter().map(find).collect::<EbpfResult<_>>()? })
    }

    /// The table, as programs have it: a `repr(C)` struct of nothing but words.
    pub fn bytes(&self) -> Vec<u8> {
        self.offsets.iter().flat_map(|offset| offset.to_ne_bytes()).collect()
    }

    /// The table of the survey.
    pub fn table(&self) -> EbpfResult<Offsets> {
        Offsets::from_values(&self.offsets).ok_or(EbpfError::BadBtf { at: 0 })
    }
}

/// Where the fields of another table are in the running kernel, in its order.
pub fn offsets(sources: &[Source]) -> EbpfResult<Vec<u32>> {
    let bytes = fs::read(VMLINUX).map_err(|source| EbpfError::NoBtf { path: VMLINUX, source })?;
    Btf::scan(&bytes, &structs_of(sources), &[])?.offsets(sources)
}

fn structs_of(sources: &[Source]) -> Vec<&'static str> {
    let mut structs: Vec<&str> = sources.iter().map(|source| source.of).collect();
    structs.dedup();
    structs
}

/// How many types the kernel describes, and the ids of some functions and typedefs by their names.
pub fn ids(names: &[&str]) -> EbpfResult<(usize, Vec<Option<u32>>)> {
    let bytes = fs::read(VMLINUX).map_err(|source| EbpfError::NoBtf { path: VMLINUX, source })?;
    let btf = Btf::scan(&bytes, &[], names)?;
    let find = |name: &&str| btf.functions.iter().find(|(known, _)| known == name).map(|(_, id)| *id);
    Ok((btf.starts.len(), names.iter().map(find).collect()))
}

/// A walk's yield.
struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Byte offset in `types` of each type, by id; id 0 is `void`.
    starts: Vec<u32>,
    structs: Vec<(&'a str, u32)>,
    /// Functions and typedefs: a tracepoint is known by a typedef.
    functions: Vec<(&'a str, u32)>,
}

impl<'a> Btf<'a> {
    /// Walks over all types once.
    fn scan(bytes: &'a [u8], structs: &[&'a str], functions: &[&'a str]) -> EbpfResult<Self> {
        let header = |at| u32_at(bytes, at);
        if bytes.get(..2) != Some(&MAGIC.to_ne_bytes()) {
            return Err(EbpfError::BadBtf { at: 0 });
        }
        let start = header(4)? as usize;
        let section = |offset: u32, length: u32| {
            let from = start.checked_add(offset as usize).filter(|from| *from >= HEADER);
            let range = from.and_then(|from| Some(from..from.checked_add(length as usize)?));
            range.and_then(|range| bytes.get(range)).ok_or(EbpfError::BadBtf { at: start })
        };
        let (types, strings) = (section(header(8)?, header(12)?)?, section(header(16)?, header(20)?)?);
        let mut btf = Self { types, strings, starts: vec![0], structs: Vec::new(), functions: Vec::new() };
        btf.starts.reserve(types.len() / 20);
        let mut at = 0;
        while at < types.len() {
            let id = btf.starts.len() as u32;
            btf.starts.push(at as u32);
            let kind = btf.kind(at)?;
            if kind == STRUCT {
                btf.structs.extend(btf.wanted(at, structs)?.map(|name| (name, id)));
            } else if kind == FUNC || kind == TYPEDEF {
                btf.functions.extend(btf.wanted(at, functions)?.map(|name| (name, id)));
            }
            at += 12 + btf.extra(at)?;
        }
        Ok(btf)
    }

    /// The one of `names` that the type at `at` has.
    fn wanted(&self, at: usize, names: &[&'a str]) -> EbpfResult<Option<&'a str>> {
        let name = u32_at(self.types, at)? as usize;
        let rest = self.strings.get(name..).ok_or(EbpfError::BadBtf { at })?;
        Ok(names.iter().copied().find(|wanted| is_string(rest, wanted)))
    }

    fn kind(&self, at: usize) -> EbpfResult<u32> {
        Ok(u32_at(self.types, at + 4)? >> 24 & 0x1f)
    }

    fn members(&self, at: usize) -> EbpfResult<usize> {
        Ok((u32_at(self.types, at + 4)? & 0xffff) as usize)
    }

    /// Bytes that follow the three words which every type has.
    fn extra(&self, at: usize) -> EbpfResult<usize> {
        Ok(match self.kind(at)? {
            // INT, VAR, DECL_TAG
            1 | 14 | 17 => 4,
            // ARRAY
            3 => 12,
            // STRUCT, UNION, DATASEC, ENUM64
            STRUCT | UNION | 15 | 19 => 12 * self.members(at)?,
            // ENUM, FUNC_PROTO
            6 | 13 => 8 * self.members(at)?,
            // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
            2 | 7..=12 | 16 | 18 => 0,
            _ => return Err(EbpfError::BadBtf { at }),
        })
    }

    /// The whole of a table.
    fn offsets(&self, sources: &[Source]) -> EbpfResult<Vec<u32>> {
        let offset = |source: &Source| match self.lookup(source.of, source.field)? {
            Some(value) => Ok(value),
            None if source.needed => {
                let what = match source.field {
                    "" => format!("`struct {}`", source.of),
                    field => format!("field `{field}` in `struct {}`", source.of),
                };
                Err(EbpfError::Missing { what })
            }
            None => Ok(ABSENT),
        };
        sources.iter().map(offset).collect()
    }

    /// Offset of a field, or size of a struct; see [`criu_common::offsets::Source`].
    fn lookup(&self, of: &str, field: &str) -> EbpfResult<Option<u32>> {
        let Some((_, mut id)) = self.structs.iter().find(|(name, _)| *name == of).copied() else { return Ok(None) };
        if field.is_empty() {
            return Ok(Some(u32_at(self.types, self.start(id)? + 8)?));
        }
        let (path, wants_bit) = field.strip_suffix("#bit").map_or((field, false), |path| (path, true));
        let mut bits = 0;
        for name in path.split('.') {
            let Some((offset, kind)) = self.member(id, name, 0)? else { return Ok(None) };
            bits += offset;
            id = kind;
        }
        Ok(Some(if wants_bit { bits % 8 } else { bits / 8 }))
    }

    /// Bit offset and type of a member, looked for in anonymous members as well. A type that has no members has none of
    /// that name.
    fn member(&self, id: u32, name: &str, depth: u32) -> EbpfResult<Option<(u32, u32)>> {
        let at = self.start(self.unqualified(id)?)?;
        if depth > MAX_DEPTH || ![STRUCT, UNION].contains(&self.kind(at)?) {
            return Ok(None);
        }
        let has_bit_fields = u32_at(self.types, at + 4)? >> 31 != 0;
        for member in 0..self.members(at)? {
            let at = at + 12 + member * 12;
            let (name_at, kind) = (u32_at(self.types, at)?, u32_at(self.types, at + 4)?);
            let mut offset = u32_at(self.types, at + 8)?;
            if has_bit_fields {
                offset &= 0x00ff_ffff;
            }
            if name_at == 0 {
                if let Some((inner, kind)) = self.member(kind, name, depth + 1)? {
                    return Ok(Some((offset + inner, kind)));
                }
            } else if is_string(self.strings.get(name_at as usize..).unwrap_or_default(), name) {
                return Ok(Some((offset, kind)));
            }
        }
        Ok(None)
    }

    /// What is behind typedefs, `const` and the like.
    fn unqualified(&self, mut id: u32) -> EbpfResult<u32> {
        for _ in 0..MAX_DEPTH {
            let at = self.start(id)?;
            if id == 0 || !CONST_LIKE.contains(&self.kind(at)?) {
                return Ok(id);
            }
            id = u32_at(self.types, at + 8)?;
        }
        Err(EbpfError::BadBtf { at: self.start(id)? })
    }

    fn start(&self, id: u32) -> EbpfResult<usize> {
        self.starts.get(id as usize).map(|at| *at as usize).ok_or(EbpfError::BadBtf { at: self.types.len() })
    }
}

fn is_string(at: &[u8], wanted: &str) -> bool {
    at.starts_with(wanted.as_bytes()) && at.get(wanted.len()) == Some(&0)
}

fn u32_at(bytes: &[u8], at: usize) -> EbpfResult<u32> {
    let word = bytes.get(at..).and_then(|rest| rest.first_chunk());
    word.map(|word| u32::from_ne_bytes(*word)).ok_or(EbpfError::BadBtf { at })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two structs, one inside the other behind a typedef and an anonymous union, and a function.
    fn sample() -> Vec<u8> {
        let strings = b"\0outer\0inner\0a\0b\0alias\0run\0";
        let name = |text: &str| {
            let at =
                strings.windows(text.len() + 1).position(|w| w[..text.len()] == *text.as_bytes() && w[text.len()] == 0);
            at.expect("in the table") as u32
        };
        let words = [
            // 1: int
            [name("b"), 1 << 24, 4, 32].as_slice(),
            // 2: struct inner { int a; int b:3 at bit 37 }
            &[name("inner"), 1 << 31 | STRUCT << 24 | 2, 8],
            &[name("a"), 1, 0],
            &[name("b"), 1, 3 << 24 | 37],
            // 3: typedef inner alias
            &[name("alias"), TYPEDEF << 24, 2],
            // 4: union { alias inner; }
            &[0, UNION << 24 | 1, 8],
            &[name("inner"), 3, 0],
            // 5: struct outer { int a; union at byte 8 }
            &[name("outer"), STRUCT << 24 | 2, 16],
            &[name("a"), 1, 0],
            &[0, 4, 64],
            // 6: function
            &[name("run"), FUNC << 24, 0],
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut bytes = [MAGIC.to_ne_bytes().as_slice(), &[1, 0]].concat();
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        [bytes, types, strings.to_vec()].concat()
    }

    #[test]
    fn fields_are_found_through_what_is_anonymous_and_what_is_an_alias() {
        let bytes = sample();
        let btf = Btf::scan(&bytes, &["outer", "inner"], &["run"]).expect("well formed");
        assert_eq!(btf.lookup("outer", "a").expect("well formed"), Some(0));
        assert_eq!(btf.lookup("outer", "inner.a").expect("well formed"), Some(8));
        assert_eq!(btf.lookup("outer", "inner.b").expect("well formed"), Some(12));
        assert_eq!(btf.lookup("outer", "inner.b#bit").expect("well formed"), Some(5));
        assert_eq!(btf.lookup("outer", "").expect("well formed"), Some(16));
        assert_eq!(btf.lookup("outer", "b").expect("well formed"), None);
        assert_eq!(btf.lookup("outer", "a.b").expect("well formed"), None);
        assert_eq!(btf.functions, [("run", 6)]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(noise in proptest::collection::vec((0usize..200, any::<u8>()), 1..8), cut in 0usize..200) {
            let mut bytes = sample();
            for (at, value) in noise {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(bytes.len().saturating_sub(cut % 64));
            if let Ok(btf) = Btf::scan(&bytes, &["outer", "inner"], &["run"]) {
                for field in ["", "a", "inner.a", "inner.b#bit"] {
                    // Either answer is right for noise; it has to be one.
                    let _ = btf.lookup("outer", field);
                }
            }
        }
    }
}
