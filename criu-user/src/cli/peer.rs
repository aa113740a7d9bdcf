//! Options of CRIU that are none of ours. Whoever types one learns why, and what to do instead; none is ignored.

use clap::error::{ContextKind, ContextValue, ErrorKind};

const NAMESPACES: &str = "trees in namespaces of their own are not supported yet";
const NETWORK: &str = "images are files: copy the directory, or dump into one on a network file system";
const SECURITY: &str = "the tree gets the security labels of whoever restores it";
const CGROUPS: &str = "all groups of the tree are dumped with the properties that are known; --manage-cgroups says what a \
                       restore does with them";
const INOTIFY: &str = "watched files are found by their handles, without a search";
const LOOKUP: &str = "there are no configuration files; give options on the command line";

/// Options of CRIU 4.2 that no command here knows, and what to tell those who type them.
const OPTIONS: &[(&[&str], &str)] = &[
    (&["--tree", "-t"], "the images know their tree; this command needs no pid"),
    (&["--config"], LOOKUP),
    (&["--log-pid"], "there is one log; its lines begin with the pid that they are about"),
    (&["--close"], "close descriptors in whatever starts criu-ebpf"),
    (&["--libdir", "-L"], "there are no plugins"),
    (&["--evasive-devices"], "devices are found by their paths only"),
    (&["--unprivileged"], "run it as root, or with the capabilities that the error message names"),
    (&["--allow-uprobes"], "remove the probes before the dump"),
    (&["--stream"], "images are files in a directory; pack them once the dump is done"),
    (&["--lazy-pages"], "all memory is filled before the tree runs"),
    (&["--page-server", "--address", "--port", "--ps-socket"], NETWORK),
    (&["--tls", "--tls-cacert", "--tls-cacrl", "--tls-cert", "--tls-key", "--tls-no-cn-verify"], NETWORK),
    (&["--daemon"], "there is no service to run in the background"),
    (&["--force-irmap", "--irmap-scan-path"], INOTIFY),
    (&["--cgroup-props", "--cgroup-props-file", "--cgroup-dump-controller", "--cgroup-yard"], CGROUPS),
    (&["--lsm-profile", "--lsm-mount-context"], SECURITY),
    (&["--file-validation"], "files are told by size and time of their last change; see --skip-file-validation"),
    (&["--mntns-compat-mode", "--skip-mnt", "--enable-fs", "--ext-mount-map", "-M"], NAMESPACES),
    (&["--enable-external-sharing", "--enable-external-masters"], NAMESPACES),
    (&["--empty-ns", "--join-ns", "-J", "--veth-pair", "--weak-sysctls"], NAMESPACES),
];

/// What to say where the parser has met an option that CRIU would have known.
pub(super) fn refusal(err: &clap::Error) -> Option<String> {
    let option = match (err.kind(), err.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(option))) => option,
        _ => return None,
    };
    let name = option.split('=').next().unwrap_or(option);
    if let Some((_, why)) = OPTIONS.iter().find(|(names, _)| names.contains(&name)) {
        return Some(format!("CRIU's option {name} is not supported here: {why}"));
    }
    let negated = name.strip_prefix("--no-")?;
    Some(format!("options cannot be negated: leave --{negated} out instead of giving {name}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn every_option_of_the_table_is_unknown_and_explained() {
        for (name, why) in OPTIONS.iter().flat_map(|(names, why)| names.iter().map(move |name| (name, why))) {
            let err = Cli::try_parse_from(["criu-ebpf", "restore", name, "x"]).expect_err(name);
            let said = refusal(&err).unwrap_or_else(|| panic!("{name}: {err}"));
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn other_mistakes_are_left_to_the_parser() {
        let err = Cli::try_parse_from(["criu-ebpf", "dump", "--no-such-thing"]).expect_err("unknown");
        assert!(refusal(&err).is_some_and(|said| said.contains("negated")));
        let err = Cli::try_parse_from(["criu-ebpf", "dump", "--unheard-of"]).expect_err("unknown");
        assert!(refusal(&err).is_none());
        let err = Cli::try_parse_from(["criu-ebpf", "dump"]).expect_err("without a pid");
        assert!(refusal(&err).is_none());
    }
}
