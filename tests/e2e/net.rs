//! Networks of the tests' own: a namespace, and what connects it with ours.

use std::{ffi::OsString, fs, process::Command};

use e2e::{Program, Workload};

/// A network namespace and a cable to it; both go with this.
pub struct Network {
    name: String,
    /// Carries the packets, where they do not go through a cable.
    link: Option<Program>,
}

impl Network {
    /// `number` tells the networks of one run apart, the process id those of several.
    pub fn new(number: u8) -> Self {
        let network = Self { name: format!("e2e{}-{number}", std::process::id()), link: None };
        ip(&format!("netns add {}", network.name));
        network.cable(number);
        network
    }

    fn cable(&self, number: u8) {
        ip(&format!("link add e{}-{number} type veth peer name peer netns {}", std::process::id(), self.name));
        self.configure(number);
    }

    /// Takes an interface of our own away.
    pub fn remove(&self, interface: &str) {
        ip(&format!("link del {interface}"));
    }

    /// Takes the cable away and lays another one, with the same addresses.
    pub fn replace_cable(&self) {
        let number = self.name.rsplit('-').next().and_then(|number| number.parse().ok()).expect("a number");
        ip(&format!("link del e{}-{number}", std::process::id()));
        self.cable(number);
    }

    /// The same, but what is sent comes late, out of order, or not at all.
    pub fn lossy(number: u8) -> Self {
        let pid = std::process::id();
        let own = format!("e{pid}-{number}");
        let mut network = Self { name: format!("e2e{pid}-{number}"), link: None };
        ip(&format!("netns add {}", network.name));
        network.link = Some(Workload::new("lossy.py", "link").env("E2E_INTERFACE", &own).start());
        ip(&format!("link set {own}p netns {} name peer", network.name));
        network.configure(number);
        network
    }

    fn configure(&self, number: u8) {
        let (pid, name) = (std::process::id(), &self.name);
        let (own, subnet) = (format!("e{pid}-{number}"), format!("10.{}.{number}", 64 + pid % 128));
        let v6 = format!("fd00:{:x}:{number}:", pid & 0xffff);
        ip(&format!("addr add {subnet}.1/24 dev {own}"));
        ip(&format!("addr add {v6}:1/64 dev {own} nodad"));
        ip(&format!("link set {own} up"));
        ip(&format!("-n {name} addr add {subnet}.2/24 dev peer"));
        ip(&format!("-n {name} addr add {v6}:2/64 dev peer nodad"));
        ip(&format!("-n {name} link set peer up"));
    }

    /// The same program, but run there.
    pub fn inside(&self, mut workload: Workload) -> Workload {
        let words = ["ip", "netns", "exec", &self.name];
        workload.command.splice(0..0, words.map(OsString::from));
        workload
    }

    /// What runs a program with this network and our own of everything else.
    pub fn entrance(&self) -> [String; 2] {
        ["nsenter".into(), format!("--net=/run/netns/{}", self.name)]
    }

    /// Turns its own loopback interface on.
    pub fn loopback(&self) {
        ip(&format!("-n {} link set lo up", self.name));
    }

    /// Sets something for all connections from there.
    pub fn set(&self, name: &str, value: &str) {
        ip(&format!("netns exec {} sysctl -q -w {name}={value}", self.name));
    }

    /// What we send there gets lost, as nobody has the address that it goes to. What comes from there comes.
    pub fn lose_answers(&self) {
        self.neighbours("replace", " lladdr 02:00:00:00:00:01 nud permanent");
    }

    /// What we send there comes again.
    pub fn find_answers(&self) {
        self.neighbours("del", "");
    }

    fn neighbours(&self, verb: &str, how: &str) {
        let (pid, number) = (std::process::id(), self.name.rsplit('-').next().expect("a number"));
        for family in ["v4", "v6"] {
            let own = self.address(family);
            let peer = format!("{}2", own.strip_suffix('1').expect("the first address"));
            ip(&format!("neigh {verb} {peer} dev e{pid}-{number}{how}"));
        }
    }

    /// How many packets came late and how many not at all, so far.
    pub fn troubles(&self) -> (u64, u64) {
        let link = self.link.as_ref().expect("a network that loses packets");
        let text = fs::read_to_string(link.file("troubles")).expect("what the link says of itself");
        let (late, lost) = text.split_once(' ').expect("two numbers");
        (late.parse().expect("a number"), lost.parse().expect("a number"))
    }

    /// Our address there, as it is seen from the other end.
    pub fn address(&self, family: &str) -> String {
        let pid = std::process::id();
        let number = self.name.rsplit('-').next().expect("a number");
        if family == "v6" {
            format!("fd00:{:x}:{number}::1", pid & 0xffff)
        } else {
            format!("10.{}.{number}.1", 64 + pid % 128)
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The cable goes with its end.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().expect("starting ip");
    assert!(status.success(), "ip {words}: {status}");
}
