//! What the files of a dump say of each other.
//!
//! These look at messages that are decoded already, so that a restore can ask before it creates anything, without
//! reading a file twice. [`dump`] asks all of it of a whole directory.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use super::{
    FoundRun, ImageDir, ImageError, ImageKind, ImageName, PAGE_SIZE, PageStore, TaskState, VmaStatus, check,
    proto::{core_entry::March, *},
};

fn wrong<T>(file: &Path, what: String) -> Result<T, ImageError> {
    Err(ImageError::Contradiction { file: file.to_owned(), what })
}

/// The tree: every pid once, parents first, every process with its leader among its threads.
pub fn tree(file: &Path, tree: &[PstreeEntry]) -> Result<(), ImageError> {
    let mut tasks = HashSet::new();
    let mut pids = HashSet::new();
    if tree.is_empty() {
        return wrong(file, "there is no process in it".into());
    }
    for (n, process) in tree.iter().enumerate() {
        let pid = process.pid;
        if n > 0 && !pids.contains(&process.ppid) {
            return wrong(file, format!("process {pid} comes before its parent {} or has none", process.ppid));
        }
        if pid == 0 || !pids.insert(pid) {
            return wrong(file, format!("process {pid} is there twice, or no process"));
        }
        let threads = threads(process);
        if !threads.contains(&pid) {
            return wrong(file, format!("process {pid} is not among its own threads"));
        }
        if let Some(tid) = threads.iter().find(|&&tid| tid == 0 || !tasks.insert(tid)) {
            return wrong(file, format!("thread {tid} of process {pid} is there twice, or no thread"));
        }
    }
    Ok(())
}

/// The threads of a process. CRIU writes any number for the one thread of a process that has ended.
pub fn threads(process: &PstreeEntry) -> &[u32] {
    match &process.threads[..] {
        [] | [_] => std::slice::from_ref(&process.pid),
        several => several,
    }
}

/// A thread: for this machine, and complete for what it is. Returns whether it is alive.
pub fn core(file: &Path, core: &CoreEntry, leader: bool) -> Result<bool, ImageError> {
    if core.mtype() != March::X8664 {
        return wrong(file, format!("it is of another machine ({}), this one is x86_64", core.mtype().as_str_name()));
    }
    let alive = match &core.tc {
        Some(tc) => match TaskState::from_raw(tc.task_state) {
            Some(state) => state.lives(),
            None => return wrong(file, format!("the process is in the unknown state {}", tc.task_state)),
        },
        None if leader => return wrong(file, "what only a process has is missing".into()),
        None => true,
    };
    let ended = core.tc.as_ref().is_some_and(|tc| tc.leader_ended());
    if alive && !ended && (core.thread_info.is_none() || core.thread_core.is_none()) {
        return wrong(file, "registers or what every thread has are missing".into());
    }
    Ok(alive)
}

/// All open file descriptions, by their ids.
pub type Descriptions<'f> = HashMap<u32, &'f FileEntry>;

/// File descriptions: every id once, and exactly what belongs to the type.
pub fn descriptions<'f>(
    file: &Path,
    files: impl IntoIterator<Item = &'f FileEntry>,
) -> Result<Descriptions<'f>, ImageError> {
    let mut by_id = HashMap::new();
    for entry in files {
        let id = entry.id;
        let Ok(kind) = FdTypes::try_from(entry.r#type) else {
            return wrong(file, format!("description {id} is of the unknown type {}", entry.r#type));
        };
        if by_id.insert(id, entry).is_some() {
            return wrong(file, format!("description {id} is there twice"));
        }
        match member(entry, kind) {
            Some(inner) if inner == id => {}
            Some(inner) => return wrong(file, format!("description {id} calls itself {inner} further down")),
            None => return wrong(file, format!("description {id} has nothing for its type {}", kind.as_str_name())),
        }
    }
    Ok(by_id)
}

/// The id within the member that belongs to a type.
fn member(entry: &FileEntry, kind: FdTypes) -> Option<u32> {
    use FdTypes as T;
    match kind {
        T::Reg => entry.reg.as_ref().map(|e| e.id),
        T::Pipe => entry.pipe.as_ref().map(|e| e.id),
        T::Fifo => entry.fifo.as_ref().map(|e| e.id),
        T::Inetsk => entry.isk.as_ref().map(|e| e.id),
        T::Unixsk => entry.usk.as_ref().map(|e| e.id),
        T::Eventfd => entry.efd.as_ref().map(|e| e.id),
        T::Eventpoll => entry.epfd.as_ref().map(|e| e.id),
        T::Inotify => entry.ify.as_ref().map(|e| e.id),
        T::Signalfd => entry.sgfd.as_ref().map(|e| e.id),
        T::Packetsk => entry.psk.as_ref().map(|e| e.id),
        T::Tty => entry.tty.as_ref().map(|e| e.id),
        T::Fanotify => entry.ffy.as_ref().map(|e| e.id),
        T::Netlinksk => entry.nlsk.as_ref().map(|e| e.id),
        T::Ns => entry.nsf.as_ref().map(|e| e.id),
        T::Tunf => entry.tunf.as_ref().map(|e| e.id),
        T::Ext => entry.ext.as_ref().map(|e| e.id),
        T::Timerfd => entry.tfd.as_ref().map(|e| e.id),
        T::Memfd => entry.memfd.as_ref().map(|e| e.id),
        T::Bpfmap => entry.bpf.as_ref().map(|e| e.id),
        T::Pidfd => entry.pidfd.as_ref().map(|e| e.id),
        T::Und | T::CtlTty | T::AutofsPipe => None,
    }
}

/// A descriptor table: every number once, every description there and of the type said.
pub fn descriptors(file: &Path, table: &[FdinfoEntry], type_of: impl Fn(u32) -> Option<i32>) -> Result<(), ImageError> {
    let mut numbers = HashSet::with_capacity(table.len());
    for FdinfoEntry { id, fd, r#type, .. } in table {
        if i32::try_from(*fd).is_err() || !numbers.insert(*fd) {
            return wrong(file, format!("descriptor {fd} is there twice, or no descriptor"));
        }
        match type_of(*id) {
            Some(known) if known == *r#type => {}
            Some(_) => return wrong(file, format!("descriptor {fd} is of another type than its description {id}")),
            None => return wrong(file, format!("descriptor {fd} is of description {id}, which is nowhere")),
        }
    }
    Ok(())
}

/// An address space: whole pages, in order, nothing twice; the files that are mapped are there.
pub fn areas(file: &Path, mm: &MmEntry, files: &Descriptions<'_>) -> Result<(), ImageError> {
    let mut end = 0;
    for vma in &mm.vmas {
        let place = || format!("area {:#x}-{:#x}", vma.start, vma.end);
        if vma.start >= vma.end || !vma.start.is_multiple_of(PAGE_SIZE) || !vma.end.is_multiple_of(PAGE_SIZE) {
            return wrong(file, format!("{} is none", place()));
        }
        let status = VmaStatus::from_bits_retain(vma.status);
        if status.contains(VmaStatus::GUARD) {
            continue;
        }
        if vma.start < end {
            return wrong(file, format!("{} begins before the end of the one before it", place()));
        }
        end = vma.end;
        if status.intersects(VmaStatus::FILE_PRIVATE | VmaStatus::FILE_SHARED)
            && !u32::try_from(vma.shmid).is_ok_and(|id| files.contains_key(&id))
        {
            return wrong(file, format!("{} maps file {}, which is nowhere", place(), vma.shmid));
        }
    }
    if !files.contains_key(&mm.exe_file_id) {
        return wrong(file, format!("the program is file {}, which is nowhere", mm.exe_file_id));
    }
    Ok(())
}

/// Pages: none outside of the areas.
pub fn pages(file: &Path, mm: &MmEntry, pages: &[FoundRun]) -> Result<(), ImageError> {
    let mut vmas = mm.vmas.iter().filter(|vma| vma.status & VmaStatus::GUARD.bits() == 0).peekable();
    for run in pages {
        let mut next = run.range.start();
        while next < run.range.end() {
            while vmas.next_if(|vma| vma.end <= next).is_some() {}
            match vmas.peek() {
                Some(vma) if vma.start <= next => next = vma.end,
                _ => return wrong(file, format!("it has a page at {next:#x}, where nothing is mapped")),
            }
        }
    }
    Ok(())
}

/// Seccomp filters: each as long as a program can be, and following those that it builds on comes to an end.
pub fn filters(file: &Path, seccomp: &SeccompEntry) -> Result<(), ImageError> {
    let filters = &seccomp.seccomp_filters;
    let mut ends = vec![false; filters.len()];
    for (n, filter) in filters.iter().enumerate() {
        // struct sock_filter; BPF_MAXINSNS of linux/bpf_common.h.
        if filter.filter.is_empty() || !filter.filter.len().is_multiple_of(8) || filter.filter.len() > 8 * 4096 {
            return wrong(file, format!("filter {n} has {} bytes, which no program has", filter.filter.len()));
        }
        let mut chain = vec![n];
        let mut at = n;
        while !ends[at] {
            let Some(prev) = filters[at].prev else { break };
            at = prev as usize;
            if at >= filters.len() || chain.len() > filters.len() {
                return wrong(file, format!("filter {n} builds on filters without an end, or on one that is nowhere"));
            }
            chain.push(at);
        }
        for seen in chain {
            ends[seen] = true;
        }
    }
    Ok(())
}

/// All of the above, and every file by itself, for a whole dump. Of a pre-dump, which has no more than memory, every file
/// by itself and the pages of those before it. Returns the number of files.
pub fn dump(dir: &ImageDir) -> Result<usize, ImageError> {
    let names = dir.list()?;
    for &name in &names {
        check::file(dir, name)?;
    }
    let store = PageStore::open(dir)?;
    for &ImageName { kind, id } in &names {
        match (kind, u32::try_from(id)) {
            (ImageKind::Pagemap, Ok(pid)) => drop(store.process(pid)?.found()?),
            (ImageKind::PagemapShmem, _) => drop(store.shmem(id)?.found()?),
            _ => {}
        }
    }
    if dir.inventory()?.pre_dump() {
        return Ok(names.len());
    }
    let path = |name: ImageName| dir.path_of(name);

    let files: Vec<FileEntry> = dir.read_all(ImageKind::Files)?;
    let files = descriptions(&dir.path_of(ImageKind::Files), &files)?;
    for &name in names.iter().filter(|name| name.kind == ImageKind::Fdinfo) {
        descriptors(&path(name), &dir.read_all(name)?, |id| files.get(&id).map(|file| file.r#type))?;
    }
    let seccomp: SeccompEntry = dir.read_optional(ImageKind::Seccomp)?.unwrap_or_default();
    filters(&dir.path_of(ImageKind::Seccomp), &seccomp)?;

    let processes: Vec<PstreeEntry> = dir.read_all(ImageKind::Pstree)?;
    tree(&dir.path_of(ImageKind::Pstree), &processes)?;
    for process in &processes {
        let name = ImageKind::Core.id(process.pid.into());
        let leader: CoreEntry = dir.read_one(name)?;
        let mut alive = core(&path(name), &leader, true)?;
        for &tid in threads(process).iter().filter(|&&tid| tid != process.pid) {
            let name = ImageKind::Core.id(tid.into());
            alive |= core(&path(name), &dir.read_one(name)?, false)?;
        }
        if alive {
            alive_process(dir, process.pid, leader.ids, &files, &store)?;
        }
    }
    Ok(names.len())
}

fn alive_process(
    dir: &ImageDir,
    pid: u32,
    ids: Option<TaskKobjIdsEntry>,
    files: &Descriptions<'_>,
    store: &PageStore<'_>,
) -> Result<(), ImageError> {
    let ids = match ids {
        Some(ids) => ids,
        None => dir.read_one(ImageKind::Ids.id(pid.into()))?,
    };
    let table = ImageKind::Fdinfo.id(ids.files_id.into());
    if !dir.exists(table)? {
        return Err(ImageError::Missing { file: dir.path_of(table) });
    }
    let name = ImageKind::Fs.id(pid.into());
    let fs: FsEntry = dir.read_one(name)?;
    for id in [fs.cwd_id, fs.root_id] {
        if !files.contains_key(&id) {
            return wrong(&dir.path_of(name), format!("it names directory {id}, which is nowhere"));
        }
    }
    let name = ImageKind::Mm.id(pid.into());
    let mm: MmEntry = dir.read_one(name)?;
    areas(&dir.path_of(name), &mm, files)?;
    let found = store.process(pid)?.found()?;
    pages(&dir.path_of(ImageKind::Pagemap.id(pid.into())), &mm, &found)
}
