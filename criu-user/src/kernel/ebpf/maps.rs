//! Maps that programs and the engine share: making them, filling them, and reading what is in them.
//!
//! # References
//! bpf(2); `union bpf_attr` in include/uapi/linux/bpf.h.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use aya_obj::Map;

use super::bpf::{BpfResult, call, call_mut, owned};

const MAP_CREATE: (c_int, &str) = (0, "BPF_MAP_CREATE");
const MAP_LOOKUP_ELEM: (c_int, &str) = (1, "BPF_MAP_LOOKUP_ELEM");
const MAP_UPDATE_ELEM: (c_int, &str) = (2, "BPF_MAP_UPDATE_ELEM");
const MAP_DELETE_ELEM: (c_int, &str) = (3, "BPF_MAP_DELETE_ELEM");
const MAP_GET_NEXT_KEY: (c_int, &str) = (4, "BPF_MAP_GET_NEXT_KEY");
const MAP_LOOKUP_BATCH: (c_int, &str) = (24, "BPF_MAP_LOOKUP_BATCH");
const MAP_UPDATE_BATCH: (c_int, &str) = (26, "BPF_MAP_UPDATE_BATCH");

/// Keys and values.
pub type Elements<const K: usize, const V: usize> = Vec<([u8; K], [u8; V])>;

/// A map as an object describes it.
pub fn create(map: &Map) -> BpfResult<OwnedFd> {
    #[repr(C)]
    struct Create {
        map_type: u32,
        key_size: u32,
        value_size: u32,
        max_entries: u32,
        map_flags: u32,
    }
    let create = Create {
        map_type: map.map_type(),
        key_size: map.key_size(),
        value_size: map.value_size(),
        max_entries: map.max_entries(),
        map_flags: map.map_flags(),
    };
    // SAFETY: the command takes no pointers and answers with a new descriptor.
    Ok(unsafe { owned(call(MAP_CREATE, &create)?) })
}

/// `union bpf_attr` of commands about one element.
#[repr(C)]
struct Element {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` of commands about many elements.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Enters keys with values of zeros, all at once where the kernel can (Linux 5.6).
pub fn insert_zeros<const K: usize, const V: usize>(map: BorrowedFd<'_>, keys: &[[u8; K]]) -> BpfResult<()> {
    insert(map, keys, &vec![[0u8; V]; keys.len()])
}

/// Enters keys and their values, of which there are as many, likewise.
pub fn insert<const K: usize, const V: usize>(
    map: BorrowedFd<'_>,
    keys: &[[u8; K]],
    values: &[[u8; V]],
) -> BpfResult<()> {
    if keys.is_empty() {
        return Ok(());
    }
    let batch = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr().addr() as u64,
        values: values.as_ptr().addr() as u64,
        count: keys.len().min(values.len()) as u32,
        map_fd: map.as_raw_fd() as u32,
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: keys and values live until the call returns, and there are as many of each as it says.
    match unsafe { call(MAP_UPDATE_BATCH, &batch) } {
        Ok(_) => return Ok(()),
        Err((_, e)) if e.raw_os_error() == Some(libc::EINVAL) => {}
        Err(e) => return Err(e),
    }
    for (key, value) in keys.iter().zip(values) {
        let element = Element {
            map_fd: map.as_raw_fd() as u32,
            padding: 0,
            key: key.as_ptr().addr() as u64,
            value: value.as_ptr().addr() as u64,
            flags: 0,
        };
        // SAFETY: key and value live until the call returns and are as long as the map says.
        unsafe { call(MAP_UPDATE_ELEM, &element)? };
    }
    Ok(())
}

/// Enters a program into an array of programs, as its first.
pub fn set_program(array: BorrowedFd<'_>, program: BorrowedFd<'_>) -> BpfResult<()> {
    let (key, value) = (0u32, program.as_raw_fd() as u32);
    let (key, value) = ((&raw const key).addr() as u64, (&raw const value).addr() as u64);
    let element = Element { map_fd: array.as_raw_fd() as u32, padding: 0, key, value, flags: 0 };
    // SAFETY: key and value live until the call returns, and are numbers of 32 bits as in every such array.
    unsafe { call(MAP_UPDATE_ELEM, &element) }.map(drop)
}

/// Whether an array of programs has a first one.
pub fn has_program(array: BorrowedFd<'_>) -> BpfResult<bool> {
    let (key, mut value) = (0u32, 0u32);
    let (key, value) = ((&raw const key).addr() as u64, (&raw mut value).addr() as u64);
    let element = Element { map_fd: array.as_raw_fd() as u32, padding: 0, key, value, flags: 0 };
    // SAFETY: key and value live until the call returns, and are numbers of 32 bits as in every such array.
    match unsafe { call(MAP_LOOKUP_ELEM, &element) } {
        Ok(_) => Ok(true),
        Err((_, err)) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(err) => Err(err),
    }
}

/// The value of a key of a hash map, if it is there.
pub fn lookup<const K: usize, const V: usize>(map: BorrowedFd<'_>, key: &[u8; K]) -> BpfResult<Option<[u8; V]>> {
    let mut value = [0u8; V];
    let element = Element {
        map_fd: map.as_raw_fd() as u32,
        padding: 0,
        key: key.as_ptr().addr() as u64,
        value: value.as_mut_ptr().expose_provenance() as u64,
        flags: 0,
    };
    // SAFETY: key and value live until the call returns and are as long as the map says.
    match unsafe { call(MAP_LOOKUP_ELEM, &element) } {
        Ok(_) => Ok(Some(value)),
        Err((_, err)) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}

/// Takes a key out of a hash map, if it is there.
pub fn delete<const K: usize>(map: BorrowedFd<'_>, key: &[u8; K]) -> BpfResult<()> {
    let (map_fd, key) = (map.as_raw_fd() as u32, key.as_ptr().addr() as u64);
    // SAFETY: the key lives until the call returns and is as long as the map says.
    match unsafe { call(MAP_DELETE_ELEM, &Element { map_fd, padding: 0, key, value: 0, flags: 0 }) } {
        Err((_, err)) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map(drop),
    }
}

/// All that is in a hash map.
pub fn entries<const K: usize, const V: usize>(map: BorrowedFd<'_>) -> BpfResult<Elements<K, V>> {
    match batches(map)? {
        Some(found) => Ok(found),
        None => one_by_one(map),
    }
}

/// What a command on many elements gives, over and over until the map's end; `None` where the kernel has none.
fn batches<const K: usize, const V: usize>(map: BorrowedFd<'_>) -> BpfResult<Option<Elements<K, V>>> {
    /// More than any bucket of a map holds: a batch has whole buckets.
    const MOST: usize = 8192;
    /// Large values are in arrays, which have none.
    const BYTES: usize = 1 << 20;
    let room = (BYTES / V.max(1)).clamp(1, MOST);
    let (mut keys, mut values) = (vec![[0u8; K]; room], vec![[0u8; V]; room]);
    let (mut token, mut found, mut first) = (0u64, Vec::new(), true);
    loop {
        let place = (&raw mut token).expose_provenance() as u64;
        let mut batch = Batch {
            in_batch: if first { 0 } else { place },
            out_batch: place,
            keys: keys.as_mut_ptr().expose_provenance() as u64,
            values: values.as_mut_ptr().expose_provenance() as u64,
            count: room as u32,
            map_fd: map.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: there is room for as many keys and values as it says, and for the token.
        let end = match unsafe { call_mut(MAP_LOOKUP_BATCH, &mut batch) } {
            Ok(_) => false,
            Err((_, e)) if e.kind() == io::ErrorKind::NotFound => true,
            Err((_, e)) if first && e.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(e) => return Err(e),
        };
        found.extend(keys.iter().copied().zip(values.iter().copied()).take(batch.count as usize));
        if end {
            return Ok(Some(found));
        }
        first = false;
    }
}

/// All that is in a map.
fn one_by_one<const K: usize, const V: usize>(map: BorrowedFd<'_>) -> BpfResult<Elements<K, V>> {
    let mut found = Vec::new();
    let mut last: Option<[u8; K]> = None;
    loop {
        let (mut next, mut value) = ([0u8; K], [0u8; V]);
        let mut element = Element {
            map_fd: map.as_raw_fd() as u32,
            padding: 0,
            key: last.as_ref().map_or(0, |key| key.as_ptr().addr() as u64),
            value: next.as_mut_ptr().expose_provenance() as u64,
            flags: 0,
        };
        // SAFETY: the next key is written where there is room for one.
        match unsafe { call(MAP_GET_NEXT_KEY, &element) } {
            Err((_, e)) if e.kind() == io::ErrorKind::NotFound => return Ok(found),
            other => other?,
        };
        element.key = next.as_ptr().addr() as u64;
        element.value = value.as_mut_ptr().expose_provenance() as u64;
        // SAFETY: key and value live until the call returns and are as long as the map says.
        match unsafe { call(MAP_LOOKUP_ELEM, &element) } {
            // Taken out by somebody else meanwhile.
            Err((_, e)) if e.kind() == io::ErrorKind::NotFound => {}
            other => {
                other?;
                found.push((next, value));
            }
        }
        last = Some(next);
    }
}
