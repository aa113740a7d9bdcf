//! The command `criu-ebpf`.

fn main() -> std::process::ExitCode {
    criu_user::cli::main()
}
