//! The interfaces of this network namespace, and their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::sys::socket::SockaddrStorage;

use super::SysResult;
use super::error::During;

/// Names and numbers of the interfaces that are up.
pub fn up() -> SysResult<BTreeMap<String, u32>> {
    let all = getifaddrs().during("getifaddrs", "interfaces")?;
    let names: BTreeSet<String> =
        all.filter(|address| address.flags.contains(InterfaceFlags::IFF_UP)).map(|a| a.interface_name).collect();
    // One that has gone meanwhile has no number.
    Ok(names.into_iter().filter_map(|name| Some((name.clone(), if_nametoindex(name.as_str()).ok()?))).collect())
}

/// The addresses of all interfaces.
pub fn addresses() -> SysResult<Vec<IpAddr>> {
    let of = |address: SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::from(v6.ip())))
    };
    Ok(getifaddrs().during("getifaddrs", "addresses")?.filter_map(|entry| of(entry.address?)).collect())
}
