//! Control groups: which ones a thread is in, and those groups themselves with what limits they set.
//!
//! cgroup.img has every combination of groups once, as a set; threads name their set. Nothing is written where all of
//! the tree is where the engine itself is. At restore the groups are made where that is wanted ([`Manage`]), and tasks
//! are put into theirs once their threads exist.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use nix::unistd::Pid;

use super::ObjectError;
use super::file::{Capture, Planner};
use crate::image::ImageKind;
use crate::image::proto::{
    CgControllerEntry, CgMemberEntry, CgSetEntry, CgroupDirEntry, CgroupEntry, CgroupPerms, CgroupPropEntry,
};
use crate::kernel::cgroup::{self, Hierarchy};
use crate::kernel::error::During;
use crate::plan::{Deed, Opened, Role, Stage, TaskRef};

/// What is done about control groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Manage {
    /// Nothing: the tree is in the groups of whoever restores
    Ignore,
    /// Tasks go into their groups, which must exist
    None,
    /// The same, and the groups' properties are set
    Props,
    /// Groups that do not exist are made, with their properties; others are left as they are
    #[default]
    Soft,
    /// Groups that do not exist are made, and the properties of all are set
    Full,
    /// All groups are made, with their properties; none may exist
    Strict,
}

/// Where a controller's groups are put: `[CONTROLLER:]PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRoot {
    /// For one controller, or for all others.
    pub controller: Option<String>,
    /// The group that stands for the one that the root of the tree was in.
    pub path: String,
}

impl std::str::FromStr for NewRoot {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (controller, path) = match text.split_once(':') {
            Some((controller, path)) => (Some(controller.to_owned()), path),
            None => (None, text),
        };
        if !path.starts_with('/') {
            return Err(format!("{path}: a control group's name starts with a slash"));
        }
        Ok(Self { controller, path: path.trim_end_matches('/').to_owned() })
    }
}

/// Files of a group that are settings and not figures, in the order in which they can be set, by controller.
const PROPERTIES: [(&str, &[&str]); 8] = [
    (
        "cpuset",
        &["cpuset.cpus", "cpuset.mems", "cpuset.cpu_exclusive", "cpuset.mem_exclusive", "cpuset.memory_migrate"],
    ),
    ("cpu", &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.rt_period_us", "cpu.rt_runtime_us"]),
    (
        "memory",
        &["memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "memory.swappiness"],
    ),
    ("blkio", &["blkio.weight", "blkio.bfq.weight"]),
    ("pids", &["pids.max"]),
    ("net_cls", &["net_cls.classid"]),
    ("net_prio", &["net_prio.ifpriomap"]),
    (
        "",
        &[
            "cgroup.max.depth",
            "cgroup.max.descendants",
            "cpu.weight",
            "cpu.max",
            "cpuset.cpus",
            "cpuset.mems",
            "memory.min",
            "memory.low",
            "memory.high",
            "memory.max",
            "memory.swap.max",
            "io.weight",
            "pids.max",
        ],
    ),
];

fn properties_of(controllers: &str) -> impl Iterator<Item = &'static str> {
    let named: Vec<&str> = controllers.split(',').collect();
    PROPERTIES.iter().filter(move |(name, _)| named.contains(name)).flat_map(|(_, files)| files.iter().copied())
}

type Groups = Vec<(String, String)>;

/// The sets met so far.
#[derive(Debug, Default)]
struct Sets {
    /// The first is the engine's own.
    list: Vec<Groups>,
    /// By the kernel's `struct css_set`.
    known: HashMap<u64, u32>,
}

impl Sets {
    fn id(&mut self, groups: Groups) -> u32 {
        let at = self.list.iter().position(|known| *known == groups).unwrap_or_else(|| {
            self.list.push(groups);
            self.list.len() - 1
        });
        at as u32 + 1
    }
}

/// The set of a thread; `None` where nobody wants to know. `css_set`: the kernel's own number of it, where that is known.
pub fn capture(cx: &mut Capture<'_>, pid: Pid, tid: Pid, css_set: Option<u64>) -> Result<Option<u32>, ObjectError> {
    if cx.options.manage_cgroups == Manage::Ignore {
        return Ok(None);
    }
    let sets = cx.shelf.get::<Sets>();
    if let Some(&known) = css_set.and_then(|css_set| sets.known.get(&css_set)) {
        return Ok(Some(known));
    }
    if sets.list.is_empty() {
        sets.list.push(cgroup::memberships(Pid::this(), Pid::this())?);
    }
    let id = sets.id(cgroup::memberships(pid, tid)?);
    if let Some(css_set) = css_set {
        sets.known.insert(css_set, id);
    }
    Ok(Some(id))
}

/// The set that the engine itself is in: who is in it needs no moving.
pub const ENGINE_SET: u32 = 1;

/// Writes the sets and their groups.
pub fn write(cx: &mut Capture<'_>) -> Result<(), ObjectError> {
    let sets = cx.shelf.take::<Sets>().list;
    if sets.len() < 2 {
        return Ok(());
    }
    let hierarchies = cgroup::hierarchies()?;
    let mut controllers = Vec::new();
    for hierarchy in &hierarchies {
        let mut groups: Vec<&str> = sets[1..]
            .iter()
            .flatten()
            .filter(|(controllers, group)| *controllers == hierarchy.controllers && group != "/")
            .map(|(_, group)| group.as_str())
            .collect();
        groups.sort_unstable();
        groups.dedup();
        let dirs: Vec<CgroupDirEntry> = groups.iter().filter_map(|group| describe(hierarchy, group)).collect();
        let cnames = hierarchy.controllers.split(',').map(str::to_owned).collect();
        controllers.push(CgControllerEntry { cnames, dirs, is_threaded: None });
    }
    let member = |(controllers, group): &(String, String)| CgMemberEntry {
        name: controllers.clone(),
        path: group.clone().into_bytes(),
        cgns_prefix: None,
    };
    let sets = sets
        .iter()
        .enumerate()
        .map(|(n, groups)| CgSetEntry { id: n as u32 + 1, ctls: groups.iter().map(member).collect() })
        .collect();
    Ok(cx.dir.write_one(ImageKind::Cgroup, &CgroupEntry { sets, controllers })?)
}

/// A group: who may do what with it, and its settings.
fn describe(hierarchy: &Hierarchy, group: &str) -> Option<CgroupDirEntry> {
    let dir = hierarchy.dir(group)?;
    let perms = |path: &Path| {
        let meta = path.metadata().ok()?;
        Some(CgroupPerms { mode: meta.permissions().mode() & 0o7777, uid: meta.uid(), gid: meta.gid() })
    };
    let properties = properties_of(&hierarchy.controllers)
        .filter_map(|name| {
            let path = dir.join(name);
            let value = std::fs::read_to_string(&path).ok()?.trim_end().to_owned();
            Some(CgroupPropEntry { name: name.to_owned(), value, perms: perms(&path) })
        })
        .collect();
    Some(CgroupDirEntry {
        dir_name: group.as_bytes().to_vec(),
        dir_perms: perms(&dir),
        properties,
        children: Vec::new(),
    })
}

/// The sets of a dump, read once.
#[derive(Debug, Default)]
struct Known {
    sets: BTreeMap<u32, Groups>,
    hierarchies: Vec<Hierarchy>,
    own: Groups,
}

/// Reads cgroup.img, and plans that its groups are there. `root` is the set of the root of the tree.
pub fn plan(cx: &mut Planner<'_>, root: Option<u32>) -> Result<(), ObjectError> {
    let mode = cx.options.manage_cgroups;
    if mode == Manage::Ignore {
        return Ok(());
    }
    let Some(entry) = cx.dir.read_optional::<CgroupEntry>(ImageKind::Cgroup)? else { return Ok(()) };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut sets: BTreeMap<u32, Groups> = BTreeMap::new();
    for set in &entry.sets {
        let mut groups = Groups::new();
        for member in &set.ctls {
            let path = text(&member.path);
            check_name(&path)?;
            groups.push((member.name.clone(), path));
        }
        sets.insert(set.id, groups);
    }
    let rewrite = Rewrite::new(&cx.options.cgroup_root, root.and_then(|root| sets.get(&root)));
    for (controllers, group) in sets.values_mut().flatten() {
        *group = rewrite.apply(controllers, group);
    }
    let hierarchies = cgroup::hierarchies()?;
    let own = cgroup::memberships(Pid::this(), Pid::this())?;
    let mut groups = Vec::new();
    for controller in &entry.controllers {
        let controllers = controller.cnames.join(",");
        let Some(hierarchy) = hierarchies.iter().find(|h| h.controllers == controllers) else { continue };
        collect(&controller.dirs, "", &mut |path, dir| {
            check_name(path)?;
            let place = hierarchy.dir(&rewrite.apply(&controllers, path));
            groups.extend(place.map(|place| Group { place, entry: dir.clone() }));
            Ok(())
        })?;
    }
    if !groups.is_empty() {
        let made = Rc::new(Made::default());
        cx.plan.after(Stage::Threads, MakeGroups { mode, groups, made: Rc::clone(&made) });
        cx.plan.after(Stage::Last, KeepGroups(made));
    }
    *cx.shelf.get::<Known>() = Known { sets, hierarchies, own };
    Ok(())
}

/// Group names come from an image: none may lead out of the hierarchy.
fn check_name(path: &str) -> Result<(), ObjectError> {
    let fine = path.starts_with('/') && !path.split('/').any(|part| part == "..");
    if fine { Ok(()) } else { Err(ObjectError::contradiction(format!("{path:?} is no control group"))) }
}

fn collect(
    dirs: &[CgroupDirEntry],
    above: &str,
    add: &mut impl FnMut(&str, &CgroupDirEntry) -> Result<(), ObjectError>,
) -> Result<(), ObjectError> {
    for dir in dirs {
        let name = String::from_utf8_lossy(&dir.dir_name).into_owned();
        let path = format!("{above}/{}", name.trim_start_matches('/'));
        add(&path, dir)?;
        collect(&dir.children, &path, add)?;
    }
    Ok(())
}

/// Other names for the groups, as `--cgroup-root` wants them.
struct Rewrite<'a> {
    roots: &'a [NewRoot],
    /// Where the root of the tree was.
    from: Groups,
}

impl<'a> Rewrite<'a> {
    fn new(roots: &'a [NewRoot], root: Option<&Groups>) -> Self {
        Self { roots, from: root.cloned().unwrap_or_default() }
    }

    fn apply(&self, controllers: &str, group: &str) -> String {
        let from = self.from.iter().find(|(c, _)| c == controllers).map(|(_, g)| g.as_str());
        let own = |root: &&NewRoot| root.controller.as_ref().is_some_and(|c| controllers.split(',').any(|n| n == c));
        let to = self.roots.iter().find(own).or_else(|| self.roots.iter().find(|root| root.controller.is_none()));
        match (from, to) {
            (Some(from), Some(to)) => match group.strip_prefix(from.trim_end_matches('/')) {
                Some(rest) if rest.is_empty() || rest.starts_with('/') => {
                    format!("{}{}", to.path, rest.trim_end_matches('/'))
                }
                _ => group.to_owned(),
            },
            _ => group.to_owned(),
        }
    }
}

/// Plans the groups of a task.
pub fn plan_task(cx: &mut Planner<'_>, task: TaskRef, set: Option<u32>) -> Result<(), ObjectError> {
    let (tid, role) = (cx.plan.task(task).tid, cx.plan.task(task).role);
    let leader = match role {
        Role::Thread(leader) => Some(leader),
        _ => None,
    };
    let known = cx.shelf.take::<Known>();
    let mut moves = Vec::new();
    if let Some(set) = set
        && !known.sets.is_empty()
    {
        let groups = known.sets.get(&set);
        let groups = groups.ok_or_else(|| ObjectError::contradiction(format!("cgroup.img has no set {set}")))?;
        // Threads come along with their leader.
        let before = leader.and_then(|leader| cx.shelf.get::<Placed>().0.get(&leader).copied());
        let before = before.and_then(|set| known.sets.get(&set)).unwrap_or(&known.own);
        for (controllers, group) in groups.iter().filter(|group| !before.contains(group)) {
            let hierarchy = known.hierarchies.iter().find(|h| h.controllers == *controllers);
            let dir = hierarchy.and_then(|h| h.dir(group)).ok_or_else(|| ObjectError::Unsupported {
                what: format!("control group {controllers}:{group} of {tid}: its hierarchy is not mounted"),
                advice: "mount it, or give --manage-cgroups=ignore",
            })?;
            let file = match (leader, controllers.is_empty()) {
                (None, _) => "cgroup.procs",
                (Some(_), true) => "cgroup.threads",
                (Some(_), false) => "tasks",
            };
            moves.push(dir.join(file));
        }
        if leader.is_none() {
            cx.shelf.get::<Placed>().0.insert(task, set);
        }
    }
    *cx.shelf.get::<Known>() = known;
    for file in moves {
        cx.plan.after(Stage::Threads, Join { tid, file });
    }
    Ok(())
}

/// The sets of leaders that have been planned.
#[derive(Debug, Default)]
struct Placed(HashMap<TaskRef, u32>);

/// Puts a task into a group.
#[derive(Debug)]
struct Join {
    tid: Pid,
    file: PathBuf,
}

impl Deed for Join {
    fn describe(&self) -> String {
        format!("write {} to {}", self.tid, self.file.display())
    }

    fn run(&self, _: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        Ok(std::fs::write(&self.file, self.tid.to_string()).during("write", self.file.display())?)
    }
}

/// A group that is to be there.
#[derive(Debug)]
struct Group {
    place: PathBuf,
    entry: CgroupDirEntry,
}

/// Groups that a restore has made: removed again unless it comes to its end.
#[derive(Debug, Default)]
struct Made(RefCell<Vec<PathBuf>>);

impl Drop for Made {
    fn drop(&mut self) {
        for dir in self.0.borrow().iter().rev() {
            // Those who were in it may need a moment to be gone.
            for _ in 0..200 {
                if std::fs::remove_dir(dir).is_ok() {
                    break;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
}

/// Sees to it that groups are there.
#[derive(Debug)]
struct MakeGroups {
    mode: Manage,
    groups: Vec<Group>,
    made: Rc<Made>,
}

/// Why a group is not as it was.
#[derive(Debug, thiserror::Error)]
enum GroupError {
    #[error("control group {0} does not exist; make it, or give --manage-cgroups=soft")]
    Missing(PathBuf),
    #[error("control group {0} exists already; remove it, or give --manage-cgroups=full")]
    Present(PathBuf),
}

impl Deed for MakeGroups {
    fn describe(&self) -> String {
        let places: Vec<String> = self.groups.iter().map(|group| group.place.display().to_string()).collect();
        format!("see to the control groups {} ({:?})", places.join(", "), self.mode)
    }

    fn run(&self, _: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        for group in &self.groups {
            let exists = group.place.is_dir();
            match (exists, self.mode) {
                (false, Manage::Ignore | Manage::None | Manage::Props) => {
                    return Err(GroupError::Missing(group.place.clone()).into());
                }
                (true, Manage::Strict) => return Err(GroupError::Present(group.place.clone()).into()),
                (false, _) => self.make(group)?,
                (true, _) => {}
            }
            if !exists || matches!(self.mode, Manage::Props | Manage::Full) {
                set_properties(group)?;
            }
        }
        Ok(())
    }
}

impl MakeGroups {
    fn make(&self, group: &Group) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let mut missing = Vec::new();
        let mut dir = Some(group.place.as_path());
        while let Some(at) = dir.filter(|at| !at.is_dir()) {
            missing.push(at.to_owned());
            dir = at.parent();
        }
        for dir in missing.into_iter().rev() {
            std::fs::create_dir(&dir).during("mkdir", dir.display())?;
            inherit_cpuset(&dir);
            self.made.0.borrow_mut().push(dir);
        }
        if let Some(perms) = &group.entry.dir_perms {
            give(&group.place, perms)?;
        }
        Ok(())
    }
}

/// A new cpuset of version 1 has no processors, and nobody can be in it: it gets its parent's.
fn inherit_cpuset(dir: &Path) {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let Some(above) = dir.parent().and_then(|parent| std::fs::read_to_string(parent.join(name)).ok()) else {
            continue;
        };
        let own = dir.join(name);
        if std::fs::read_to_string(&own).is_ok_and(|value| value.trim().is_empty()) {
            let _ = std::fs::write(&own, above.trim());
        }
    }
}

fn set_properties(group: &Group) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    for property in &group.entry.properties {
        let known = PROPERTIES.iter().any(|(_, names)| names.contains(&property.name.as_str()));
        let path = group.place.join(&property.name);
        // Other engines also save figures, and what only some kernels have.
        if !known || property.value.is_empty() || !path.exists() {
            continue;
        }
        let same = std::fs::read_to_string(&path).is_ok_and(|now| now.trim_end() == property.value);
        if !same {
            std::fs::write(&path, &property.value)
                .during("write", format!("{} to {}", property.value, path.display()))?;
        }
        if let Some(perms) = &property.perms {
            give(&path, perms)?;
        }
    }
    Ok(())
}

fn give(path: &Path, perms: &CgroupPerms) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    std::os::unix::fs::chown(path, Some(perms.uid), Some(perms.gid)).during("chown", path.display())?;
    let mode = std::fs::Permissions::from_mode(perms.mode & 0o7777);
    Ok(std::fs::set_permissions(path, mode).during("chmod", path.display())?)
}

/// The restore has come to its end: what it made stays.
#[derive(Debug)]
struct KeepGroups(Rc<Made>);

impl Deed for KeepGroups {
    fn describe(&self) -> String {
        "keep the control groups that were made".to_owned()
    }

    fn run(&self, _: &Opened) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.0.0.borrow_mut().clear();
        Ok(())
    }
}
