//! Credentials of a thread: identities, groups, capabilities, securebits, no_new_privs. credentials(7), capabilities(7).

use nix::unistd::Pid;

use super::ObjectError;
use crate::call;
use crate::image::proto::CredsEntry;
use crate::kernel::proc::KeyValues;
use crate::plan::{Plan, Stage, TaskRef};

const PR_SET_SECUREBITS: u64 = 28;
const PR_CAPBSET_DROP: u64 = 24;
const PR_SET_NO_NEW_PRIVS: u64 = 38;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
/// SECBIT_NO_SETUID_FIXUP and SECBIT_KEEP_CAPS: capabilities survive the change of uids.
const KEEP: u64 = 1 << 2 | 1 << 4;
/// _LINUX_CAPABILITY_VERSION_3 of include/uapi/linux/capability.h.
const CAP_VERSION_3: u32 = 0x2008_0522;
/// Capabilities that the format has room for.
const CAPS: u64 = 64;

/// Credentials from /proc/PID/task/TID/status and the securebits.
pub fn from_status(status: &KeyValues, secbits: u32) -> Result<CredsEntry, ObjectError> {
    let ids = |key: &str| -> Result<[u32; 4], ObjectError> {
        let words: Vec<u32> = status.words(key)?.iter().filter_map(|w| w.parse().ok()).collect();
        words.try_into().map_err(|_| ObjectError::contradiction(format!("{key} of /proc/PID/status")))
    };
    let caps = |key: &str| -> Result<Vec<u32>, ObjectError> {
        let bits = status.number(key, 16)?;
        Ok(vec![bits as u32, (bits >> 32) as u32])
    };
    let (uid, gid) = (ids("Uid")?, ids("Gid")?);
    Ok(CredsEntry {
        uid: uid[0],
        euid: uid[1],
        suid: uid[2],
        fsuid: uid[3],
        gid: gid[0],
        egid: gid[1],
        sgid: gid[2],
        fsgid: gid[3],
        groups: status.words("Groups")?.iter().filter_map(|w| w.parse().ok()).collect(),
        cap_inh: caps("CapInh")?,
        cap_prm: caps("CapPrm")?,
        cap_eff: caps("CapEff")?,
        cap_bnd: caps("CapBnd")?,
        cap_amb: caps("CapAmb")?,
        secbits,
        no_new_privs: Some(status.number("NoNewPrivs", 10)? as u32),
        ..CredsEntry::default()
    })
}

/// What the restoring engine itself has: a task starts with it.
pub fn own() -> Result<CredsEntry, ObjectError> {
    let secbits = nix::errno::Errno::result(crate::kernel::sys::securebits()).unwrap_or(0);
    from_status(&KeyValues::status(Pid::this(), Pid::this())?, secbits as u32)
}

fn bits(words: &[u32]) -> u64 {
    u64::from(words.first().copied().unwrap_or(0)) | u64::from(words.get(1).copied().unwrap_or(0)) << 32
}

/// Plans the credentials of a thread that starts with `own`.
pub fn plan(plan: &mut Plan, task: TaskRef, creds: &CredsEntry, own: &CredsEntry) -> Result<(), ObjectError> {
    let stage = Stage::Credentials;
    let mut add = |call| plan.push(task, stage, call);
    let missing = bits(&creds.cap_prm) & !bits(&own.cap_prm);
    if missing != 0 {
        return Err(ObjectError::Unsupported {
            what: format!("capabilities {missing:#x}, which the restoring process does not have"),
            advice: "run the restore with at least the capabilities that the dumped program had",
        });
    }
    let ids = |c: &CredsEntry| (c.uid, c.euid, c.suid, c.fsuid, c.gid, c.egid, c.sgid, c.fsgid);
    let same_ids = ids(creds) == ids(own) && creds.groups == own.groups;
    let same_caps = (bits(&creds.cap_prm), bits(&creds.cap_eff), bits(&creds.cap_inh))
        == (bits(&own.cap_prm), bits(&own.cap_eff), bits(&own.cap_inh));
    if !same_ids {
        add(call!(SYS_prctl(PR_SET_SECUREBITS, KEEP), "keep capabilities over the change of identity"));
        if creds.groups != own.groups {
            let list: Vec<u8> = creds.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
            add(call!(SYS_setgroups(creds.groups.len(), list), "supplementary groups"));
        }
        add(call!(SYS_setresgid(creds.gid, creds.egid, creds.sgid), "group ids"));
        add(call!(SYS_setfsgid(creds.fsgid), "group id for files"));
        add(call!(SYS_setresuid(creds.uid, creds.euid, creds.suid), "user ids"));
        add(call!(SYS_setfsuid(creds.fsuid), "user id for files"));
    }
    for cap in (0..CAPS).filter(|c| bits(&own.cap_bnd) & !bits(&creds.cap_bnd) & 1 << c != 0) {
        add(call!(SYS_prctl(PR_CAPBSET_DROP, cap), format!("bounding set without capability {cap}")));
    }
    if !same_ids || creds.secbits != own.secbits {
        add(call!(SYS_prctl(PR_SET_SECUREBITS, creds.secbits), "securebits"));
    }
    if !same_ids || !same_caps {
        let header: Vec<u8> = [CAP_VERSION_3, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        let word = |words: &[u32], i: usize| words.get(i).copied().unwrap_or(0);
        let data: Vec<u8> = (0..2)
            .flat_map(|i| [word(&creds.cap_eff, i), word(&creds.cap_prm, i), word(&creds.cap_inh, i)])
            .flat_map(|w: u32| w.to_le_bytes())
            .collect();
        add(call!(SYS_capset(header, data), "capabilities"));
    }
    if bits(&creds.cap_amb) != bits(&own.cap_amb) || !same_ids {
        add(call!(SYS_prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0u64, 0u64, 0u64), "no ambient capabilities"));
        for cap in (0..CAPS).filter(|c| bits(&creds.cap_amb) & 1 << c != 0) {
            let why = format!("ambient capability {cap}");
            add(call!(SYS_prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0u64, 0u64), why));
        }
    }
    if creds.no_new_privs == Some(1) {
        add(call!(SYS_prctl(PR_SET_NO_NEW_PRIVS, 1u64, 0u64, 0u64, 0u64), "no_new_privs"));
    }
    Ok(())
}
