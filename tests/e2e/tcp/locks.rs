//! What is tried with every lock but the usual one. Each has a module of its own, whose function `filtered` puts it to use
//! and sees that nothing of it is left.

use super::*;
use crate::net::Network;

/// A stream between two network namespaces.
pub(super) fn remote_stream(number: u8, family: &str, filtered: impl Fn(&Row, &dyn Fn(&Row))) {
    let network = Network::new(number);
    filtered(&Row::ours(e2e::Survey::Proc), &|row| {
        let row = kept(row);
        let mut pair = Pair::across(&network, ["tcp.py", "stream"], family, cycles(), [&[], &[]]);
        for _ in 0..cycles() {
            move_once(&row, &pair.program);
            pair.program.next();
        }
        pair.finish();
    });
}

/// Clients that nobody has accepted.
pub(super) fn some_clients(row: &Row) {
    let pair = Pair::of("clients.py", "some", &[]);
    move_once(&kept(row), &pair.program);
    pair.finish();
}

/// The tree runs on, and so does its connection.
pub(super) fn left_running(row: &Row) {
    let row = kept(row);
    let pair = Pair::start("quiet", "v4", 1);
    let images = row.next_images(&pair.program);
    row.dumper.dump(&pair.program, &images, &also(&row, &["-R"], &[]).options).expect_success();
    assert_eq!(gates_of(&row, &pair.program, &images), [""; 0], "gates are left");
    pair.finish();
}

/// All of them, in networks from a number on.
macro_rules! lock_rows {
    ($number:literal) => {
        #[test]
        fn remote_v4() {
            super::locks::remote_stream($number, "v4", |row, course| filtered(row, course));
        }

        #[test]
        fn remote_v6() {
            super::locks::remote_stream($number + 1, "v6", |row, course| filtered(row, course));
        }

        #[test]
        fn remote_mapped() {
            super::locks::remote_stream($number + 2, "mapped", |row, course| filtered(row, course));
        }

        rows! {
            stream_v4 => |row| filtered(row, |row| streams(row, "v4"));
            stream_v6 => |row| filtered(row, |row| streams(row, "v6"));
            stream_mapped => |row| filtered(row, |row| streams(row, "mapped"));
            stuffed => |row| filtered(row, |row| state(row, "stuffed", "v4"));
            close_wait => |row| filtered(row, |row| state(row, "close_wait", "v6"));
            fin_wait1 => |row| filtered(row, |row| unsent_end(row, "fin_wait1", "v4"));
            fin_wait2 => |row| filtered(row, |row| state(row, "fin_wait2", "mapped"));
            reset => |row| filtered(row, |row| state(row, "reset", "v4"));
            many_connections => |row| filtered(row, many);
            client_asks_later => |row| filtered(row, late_client);
            gate_is_cleared => |row| filtered(row, cleared);
            restore_that_fails => |row| filtered(row, second_restore);
            clients => |row| filtered(row, super::locks::some_clients);
            left_running => |row| filtered(row, super::locks::left_running);
            killed_in_a_dump => |row| filtered(row, killed::stream_in_a_dump);
            killed_in_a_restore => |row| filtered(row, killed::stream_in_a_restore);
        }
    };
}
pub(super) use lock_rows;
