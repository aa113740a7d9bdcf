//! What the tests look up in `/proc`, from outside of the programs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

/// A file of `/proc` as text; names in it may be any bytes. Empty if the process is gone.
fn read(path: String) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Whether there is such a process (a zombie is one).
pub fn exists(pid: i32) -> bool {
    fs::metadata(format!("/proc/{pid}")).is_ok()
}

/// The children of all threads of `pid`.
pub fn children(pid: i32) -> Vec<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<i32>>())
        .collect()
}

/// `pid` and everything below it that exists.
pub fn tree(pid: i32) -> BTreeSet<i32> {
    let mut found = BTreeSet::new();
    let mut open = vec![pid];
    while let Some(next) = open.pop() {
        if exists(next) && found.insert(next) {
            open.extend(children(next));
        }
    }
    found
}

/// The thread ids of `pid`.
pub fn threads(pid: i32) -> BTreeSet<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return BTreeSet::new() };
    tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
}

/// The fields of `/proc/PID/status`.
pub fn status(pid: i32) -> BTreeMap<String, String> {
    read(format!("/proc/{pid}/status"))
        .lines()
        .filter_map(|line| line.split_once(':').map(|(key, value)| (key.to_owned(), value.trim().to_owned())))
        .collect()
}

/// The state letter and then the numbers that follow it in `/proc/PID/stat` (parent, group, session, …).
pub fn stat(pid: i32) -> Option<(char, Vec<i64>)> {
    let text = read(format!("/proc/{pid}/stat"));
    let (_, rest) = text.rsplit_once(") ")?;
    let mut words = rest.split_whitespace();
    let state = words.next()?.chars().next()?;
    Some((state, words.filter_map(|word| word.parse().ok()).collect()))
}

/// `/proc/PID/maps`, each line as `start-end perms offset path`: what must be the same after a restore. Device and
/// inode numbers are left out (anonymous shared memory gets new ones), and so are the kernel's own mappings, whose
/// number and size differ between kernels. Neighbours that continue each other are one: whether the kernel merges them
/// depends on the order in which they were made and forked (`anon_vma`), which no program can tell. Shared anonymous
/// memory may come back as a memfd, which is what it is inside the kernel.
pub fn maps(pid: i32) -> Vec<String> {
    let mut areas: Vec<(u64, u64, String, u64, String)> = Vec::new();
    for line in read(format!("/proc/{pid}/maps")).lines() {
        if ["[vvar", "[vdso]", "[vsyscall]"].iter().any(|kernel| line.contains(kernel)) {
            continue;
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |text: &str| u64::from_str_radix(text, 16).unwrap_or_else(|error| panic!("{line}: {error}"));
        let (start, end) = words[0].split_once('-').map(|(a, b)| (number(a), number(b))).expect("start-end");
        let path = words.get(5..).unwrap_or_default().join(" ");
        let path = ["/dev/zero", "/anon_hugepage"]
            .into_iter()
            .fold(path, |path, name| path.replace(&format!("/memfd:{name}"), name));
        // Where private huge pages begin in the file that the kernel made for them depends on what was mapped together.
        let huge = path.starts_with("/anon_hugepage") && words[1].ends_with('p');
        let offset = if huge { 0 } else { number(words[2]) };
        if let Some((first, last, perms, at, name)) = areas.last_mut() {
            let anonymous = path.is_empty() || path.starts_with('[') || huge;
            let continues = anonymous || *at + (*last - *first) == offset;
            if *last == start && perms == words[1] && *name == path && continues {
                *last = end;
                continue;
            }
        }
        areas.push((start, end, words[1].to_owned(), offset, path));
    }
    areas
        .iter()
        .map(|(start, end, perms, offset, path)| format!("{start:x}-{end:x} {perms} {offset:x} {path}"))
        .collect()
}

/// The open descriptors of `pid` and what they point to.
pub fn descriptors(pid: i32) -> BTreeMap<i32, PathBuf> {
    let Ok(entries) = fs::read_dir(format!("/proc/{pid}/fd")) else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, fs::read_link(entry.path()).ok()?)))
        .collect()
}

/// The command line of `pid`, its words separated by blanks.
pub fn cmdline(pid: i32) -> String {
    read(format!("/proc/{pid}/cmdline")).replace('\0', " ").trim().to_owned()
}

/// Whether the environment of `pid` has `NAME=value`.
pub fn has_environment(pid: i32, name: &str, value: &str) -> bool {
    let wanted = format!("{name}={value}");
    fs::read(format!("/proc/{pid}/environ"))
        .is_ok_and(|environ| environ.split(|&byte| byte == 0).any(|entry| entry == wanted.as_bytes()))
}

/// Whether something is mounted right there.
pub fn is_mount_point(path: &str) -> bool {
    read("/proc/self/mounts".to_owned()).lines().any(|line| line.split(' ').nth(1) == Some(path))
}
