//! What this process may do.

use super::{Absent, Answer, ensure};
use crate::kernel::sys;

/// A capability is effective; by its number in capabilities(7).
pub fn capability<const NUMBER: u32>() -> Answer {
    ensure(sys::has_capability(NUMBER), "not held")?;
    Ok("held".to_owned())
}

/// CAP_CHECKPOINT_RESTORE itself, or CAP_SYS_ADMIN in its place: the kernel takes either.
pub fn checkpoint_restore() -> Answer {
    const CHECKPOINT_RESTORE: u32 = 40;
    const SYS_ADMIN: u32 = 21;
    match [CHECKPOINT_RESTORE, SYS_ADMIN].map(sys::has_capability) {
        [true, _] => Ok("held".to_owned()),
        [false, true] => Ok("not held, but cap_sys_admin, which includes it".to_owned()),
        _ => Err(Absent::because("not held")),
    }
}

/// The hard limit of a resource is at least so high; by its number in getrlimit(2).
pub fn limit<const RESOURCE: u32, const ENOUGH: u64>() -> Answer {
    let [_, hard] = sys::limit(RESOURCE.into())?;
    let shown = if hard == u64::MAX { "unlimited".to_owned() } else { hard.to_string() };
    ensure(hard >= ENOUGH, &format!("the hard limit is {shown}, less than {ENOUGH}"))?;
    Ok(format!("hard limit {shown}"))
}

/// The kernel that runs.
pub fn kernel() -> Answer {
    let about = nix::sys::utsname::uname().map_err(|errno| Absent::because(errno.desc()))?;
    let (release, machine) = (about.release().to_string_lossy(), about.machine().to_string_lossy());
    ensure(machine == "x86_64", &format!("{machine} is not supported"))?;
    Ok(format!("{release} {machine}"))
}
