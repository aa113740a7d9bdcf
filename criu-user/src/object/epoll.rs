//! epoll(7): which descriptions an instance watches, for what, with which data.
//!
//! The kernel keeps a registration under the description and the number that it had when it was registered. The number
//! may lead elsewhere by now, or nowhere, while a duplicate keeps the registration alive: kcmp(2) tells which
//! description is meant, and at restore it is put at that number for as long as the registration takes.
//!
//! A one-shot registration that has fired watches nothing until it is armed again, but for errors and hang-ups: the
//! kernel adds those to whatever is registered.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;

use nix::unistd::Pid;

use super::ObjectError;
use super::file::{Capture, FileKind, Planner, Seen};
use crate::call;
use crate::image::proto::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FileEntry};
use crate::kernel::{self, events};
use crate::plan::{Arg, Call, FileRef, Opened, Opener, Stage, TaskRef};

/// epoll instances.
#[derive(Debug)]
pub struct Epoll;

impl FileKind for Epoll {
    fn types(&self) -> &'static [FdTypes] {
        &[FdTypes::Eventpoll]
    }

    fn is(&self, seen: &Seen) -> bool {
        seen.is_anon("eventpoll")
    }

    fn capture(&self, seen: &Seen, cx: &mut Capture<'_>) -> Result<FileEntry, ObjectError> {
        let found = registrations(seen)?;
        let mut tfd = Vec::with_capacity(found.len());
        let mut met: HashMap<u32, u32> = HashMap::new();
        for registration in found {
            let nth = met.entry(registration.tfd).or_insert(0);
            match resolve(seen, &registration, *nth, cx)? {
                Some(file) => tfd.push(placed(seen.id, registration, file, cx)),
                None => cx.refuse(seen.refuse(
                    format!(
                        "it watches, as descriptor {}, a file that no process of the tree has open",
                        registration.tfd
                    ),
                    "dump the process that has it as well, or take it out with epoll_ctl(2)",
                )),
            }
            *nth += 1;
        }
        let epfd = EventpollFileEntry { id: seen.id, flags: seen.flags, fown: seen.fown()?, tfd };
        Ok(FileEntry {
            r#type: FdTypes::Eventpoll as i32,
            id: seen.id,
            epfd: Some(epfd.into()),
            ..FileEntry::default()
        })
    }

    fn plan(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<FileRef, ObjectError> {
        let epfd = entry.epfd.as_deref().ok_or_else(|| ObjectError::empty(entry))?;
        Ok(cx.plan.open(OpenEpoll { flags: epfd.flags }))
    }

    fn wire(&self, entry: &FileEntry, cx: &mut Planner<'_>) -> Result<(), ObjectError> {
        let epfd = entry.epfd.as_deref().ok_or_else(|| ObjectError::empty(entry))?;
        let epoll = cx.file_ref(entry.id)?;
        let numbers = cx.shelf.take::<Numbers>().known(cx);
        let holders = cx.holders.get(&entry.id).cloned().unwrap_or_default();
        for registration in &epfd.tfd {
            plan_registration(cx, &numbers, epoll, &holders, registration)?;
        }
        *cx.shelf.get::<Numbers>() = numbers;
        Ok(())
    }
}

/// The lines `tfd: N events: X data: X pos:N ino:X sdev:X` of fdinfo (fs/eventpoll.c, `ep_show_fdinfo`).
fn registrations(seen: &Seen) -> Result<Vec<EventpollTfdEntry>, ObjectError> {
    let malformed = || ObjectError::contradiction(format!("fdinfo of pid {}, fd {}", seen.pid, seen.fd));
    seen.info()?
        .all("tfd")
        .map(|line| {
            let spaced = format!("tfd: {}", line.replace(':', ": "));
            let mut words = spaced.split_ascii_whitespace();
            let mut values: HashMap<&str, &str> = HashMap::new();
            while let (Some(key), Some(value)) = (words.next(), words.next()) {
                values.insert(key, value);
            }
            let number = |key: &str, radix| {
                values.get(key).and_then(|v| u64::from_str_radix(v, radix).ok()).ok_or_else(malformed)
            };
            Ok(EventpollTfdEntry {
                id: seen.id,
                tfd: number("tfd:", 10)? as u32,
                events: number("events:", 16)? as u32,
                data: number("data:", 16)?,
                dev: number("sdev:", 16).ok().map(|dev| dev as u32),
                inode: number("ino:", 16).ok(),
                pos: number("pos:", 10).ok(),
                ..EventpollTfdEntry::default()
            })
        })
        .collect()
}

/// Who has something at a number: the process and the description.
#[derive(Debug, Default)]
struct ByNumber(HashMap<i32, Vec<(Pid, u32)>>);

/// Which description a registration is of.
fn resolve(
    seen: &Seen,
    registration: &EventpollTfdEntry,
    nth: u32,
    cx: &mut Capture<'_>,
) -> Result<Option<u32>, ObjectError> {
    let mut by_number = cx.shelf.take::<ByNumber>();
    if by_number.0.is_empty() {
        for (&file, holders) in &cx.holders {
            for &(pid, fd) in holders {
                by_number.0.entry(fd).or_default().push((pid, file));
            }
        }
    }
    let number = registration.tfd;
    // Nearly always it is where it was registered, in the process that the instance was found in.
    let same = by_number.0.get(&(number as i32)).cloned().unwrap_or_default();
    *cx.shelf.get::<ByNumber>() = by_number;
    let (own, others): (Vec<_>, Vec<_>) = same.into_iter().partition(|&(pid, _)| pid == seen.pid);
    let near = own.into_iter().chain(others).map(|(pid, file)| (pid, number as i32, file));
    let rest = cx.holders.iter().filter_map(|(&file, holders)| holders.first().map(|&(pid, fd)| (pid, fd, file)));
    for (pid, fd, file) in near.chain(rest) {
        if events::epoll_watches(&seen.file, number, nth, pid, fd)? {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

/// The registration as the image has it: `tfd` is where the first holder of the instance has the file now.
fn placed(epoll: u32, mut registration: EventpollTfdEntry, file: u32, cx: &Capture<'_>) -> EventpollTfdEntry {
    registration.file = Some(file);
    let first = cx.holders.get(&epoll).and_then(|holders| holders.iter().map(|&(pid, _)| pid).min());
    let there = || cx.holders.get(&file).into_iter().flatten().filter(|&&(pid, _)| Some(pid) == first);
    let same = there().any(|&(_, fd)| fd as u32 == registration.tfd);
    if let Some(&(_, fd)) = there().next()
        && !same
    {
        registration.number = Some(registration.tfd);
        registration.tfd = fd as u32;
    }
    registration
}

/// Which description a restored task has at a number.
#[derive(Debug, Default)]
struct Numbers(BTreeMap<(TaskRef, i32), u32>);

impl Numbers {
    fn known(mut self, cx: &Planner<'_>) -> Self {
        if self.0.is_empty() {
            let all = cx.holders.iter().flat_map(|(&file, holders)| holders.iter().map(move |&at| (at, file)));
            self.0 = all.collect();
        }
        self
    }
}

fn plan_registration(
    cx: &mut Planner<'_>,
    numbers: &Numbers,
    epoll: FileRef,
    holders: &[(TaskRef, i32)],
    registration: &EventpollTfdEntry,
) -> Result<(), ObjectError> {
    // Whoever holds it first has made the registration, as far as other engines' images are concerned.
    let Some(&(first, _)) = holders.iter().min_by_key(|(task, _)| cx.plan.task(*task).tid) else { return Ok(()) };
    let number = registration.number.unwrap_or(registration.tfd) as i32;
    if number < 0 || number == i32::MAX {
        return Err(ObjectError::contradiction(format!("epoll watches descriptor {number}")));
    }
    let file = match registration.file {
        Some(file) => file,
        None => *numbers.0.get(&(first, registration.tfd as i32)).ok_or_else(|| {
            ObjectError::contradiction(format!("epoll watches descriptor {number}, which is not open"))
        })?,
    };
    let mut event = registration.events.to_le_bytes().to_vec();
    event.extend_from_slice(&registration.data.to_le_bytes());
    let why = format!("epoll watches file {file} as descriptor {number}");
    let add = call!(SYS_epoll_ctl(epoll, libc::EPOLL_CTL_ADD, number, event), why);

    let in_place = holders.iter().find(|(task, _)| numbers.0.get(&(*task, number)) == Some(&file));
    if let Some(&(task, _)) = in_place {
        cx.plan.push(task, Stage::Wiring, add);
        return Ok(());
    }
    // For as long as it takes, the file is put where it was when it was registered.
    let target = cx.file_ref(file)?;
    let why = "where it was when epoll was told of it";
    let put = call!(SYS_dup3(target, number, libc::O_CLOEXEC), why);
    match numbers.0.get(&(first, number)) {
        None => {
            cx.plan.first_free_fd = cx.plan.first_free_fd.max(number + 1);
            for call in [put, add, call!(SYS_close(number), "it is registered")] {
                cx.plan.push(first, Stage::Wiring, call);
            }
        }
        Some(&other) => {
            let other = cx.file_ref(other)?;
            let flags = flags_of(cx.plan.task(first).stage(Stage::Files), number);
            let back = call!(SYS_dup3(other, number, flags), "what belongs there");
            for call in [put, add, back] {
                cx.plan.push(first, Stage::Wiring, call);
            }
        }
    }
    Ok(())
}

/// The flags with which a task's descriptor is put in place.
fn flags_of(calls: &[Call], number: i32) -> i32 {
    let at = Arg::from(number);
    let placed = calls.iter().rev().find(|call| call.nr == libc::SYS_dup3 && call.args.get(1) == Some(&at));
    match placed.and_then(|call| call.args.get(2)) {
        Some(Arg::Value(flags)) => *flags as i32,
        _ => 0,
    }
}

/// Makes an instance that watches nothing.
#[derive(Debug)]
struct OpenEpoll {
    flags: u32,
}

impl Opener for OpenEpoll {
    fn describe(&self) -> String {
        format!("epoll instance with flags {:#o}", self.flags)
    }

    fn open(&self, _: &Opened) -> Result<OwnedFd, Box<dyn std::error::Error + Send + Sync>> {
        let file = events::epoll()?;
        kernel::fd::set_flags_of_new(&file, self.flags as i32)?;
        Ok(file)
    }
}
