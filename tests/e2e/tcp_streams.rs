//! Streams of numbered bytes between a program that is moved again and again and a peer in another network: whatever the
//! two agreed on, with full queues, and over a link that loses, delays and reorders packets.
//!
//! `E2E_CYCLES` says how often a stream is moved (5 times if it does not).

use std::{
    fs,
    time::{Duration, Instant},
};

use e2e::{Row, Survey};

use crate::{
    net::Network,
    tcp::{Pair, cycles, kept, move_once},
};

/// What TCP_INFO says of what was agreed on.
const TIMESTAMPS: u8 = 1;
const SACK: u8 = 2;
const SCALING: u8 = 4;

/// Which end is so slow that the other's queues are full.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Slow {
    Nobody,
    Program,
    Peer,
}

/// What the peer's connections agree on from now on.
fn agree_on(network: &Network, options: u8) {
    for (name, bit) in [("timestamps", TIMESTAMPS), ("sack", SACK), ("window_scaling", SCALING)] {
        network.set(&format!("net.ipv4.tcp_{name}"), if options & bit != 0 { "1" } else { "0" });
    }
}

/// Moves the program, with the stream going on, and compares what was sent with what has come. Gives for how long the
/// stream stood still after each move.
fn moved(network: &Network, family: &str, options: u8, slow: Slow) -> Vec<Duration> {
    agree_on(network, options);
    let options = options.to_string();
    let own = |end: Slow| {
        let mut environment = vec![("E2E_OPTIONS", options.as_str())];
        environment.extend((slow == end).then_some(("E2E_SLOW", "0.01")));
        environment
    };
    let (program, peer) = (own(Slow::Program), own(Slow::Peer));
    let mut pair = Pair::across(network, ["tcp.py", "stream"], family, cycles(), [&program, &peer]);
    let row = kept(&Row::ours(Survey::Ebpf));
    let pauses = (0..cycles()).map(|_| {
        move_once(&row, &pair.program);
        let begin = Instant::now();
        pair.program.next();
        begin.elapsed()
    });
    let pauses = pauses.collect();
    let totals = [&pair.program, &pair.peer].map(|program| program.file("totals"));
    pair.end_both();
    let [program, peer] = totals.map(|path| fs::read_to_string(path).expect("how much was sent and received"));
    let (sent, received) = program.split_once(' ').expect("two numbers");
    assert_eq!(peer, format!("{received} {sent}"), "what the peer sent and received");
    pauses
}

fn agreed(number: u8, options: u8, slow: Slow) {
    moved(&Network::new(number), "v4", options, slow);
}

const ALL: u8 = TIMESTAMPS | SACK | SCALING;

#[test]
fn without_timestamps() {
    agreed(20, ALL & !TIMESTAMPS, Slow::Nobody);
}

#[test]
fn without_sack() {
    agreed(21, ALL & !SACK, Slow::Nobody);
}

#[test]
fn without_scaling() {
    agreed(22, ALL & !SCALING, Slow::Nobody);
}

#[test]
fn without_anything() {
    agreed(23, 0, Slow::Nobody);
}

#[test]
fn slow_program() {
    agreed(24, ALL, Slow::Program);
}

#[test]
fn slow_peer() {
    agreed(25, ALL, Slow::Peer);
}

#[test]
fn slow_program_without_anything() {
    agreed(26, 0, Slow::Program);
}

#[test]
fn slow_peer_without_anything() {
    agreed(27, 0, Slow::Peer);
}

/// What is lost of data that was on its way comes again as soon as it did before.
fn round_trips_are_known(number: u8, options: u8) {
    let network = Network::new(number);
    agree_on(&network, options);
    let options = options.to_string();
    let environment = [("E2E_OPTIONS", options.as_str())];
    let mut pair = Pair::across(&network, ["tcp.py", "under_way"], "v4", 1, [&environment, &environment]);
    network.lose_answers();
    pair.program.next();
    move_once(&kept(&Row::ours(Survey::Ebpf)), &pair.program);
    pair.program.next();
    network.find_answers();
    pair.finish();
}

#[test]
fn round_trip() {
    round_trips_are_known(34, ALL);
}

#[test]
fn round_trip_without_timestamps() {
    round_trips_are_known(35, ALL & !TIMESTAMPS);
}

#[test]
fn round_trip_without_anything() {
    round_trips_are_known(36, 0);
}

#[test]
fn slow_peer_v6() {
    moved(&Network::new(28), "v6", ALL, Slow::Peer);
}

#[test]
fn slow_peer_mapped() {
    moved(&Network::new(29), "mapped", ALL, Slow::Peer);
}

fn with_losses(number: u8, family: &str, options: u8) {
    let network = Network::lossy(number);
    let mut pauses = moved(&network, family, options, Slow::Nobody);
    // A socket that knows of no round-trip time sends nothing again before three seconds are over.
    pauses.sort();
    let usual = pauses.get(pauses.len() / 2);
    assert!(usual.is_none_or(|&pause| pause < Duration::from_secs(2)), "the stream stood still for {pauses:?}");
    let (late, lost) = network.troubles();
    assert!(late > 100 && lost > 0, "of {} packets {lost} were lost: that is no test", late + lost);
}

#[test]
fn lossy_v4() {
    with_losses(30, "v4", ALL);
}

#[test]
fn lossy_v6() {
    with_losses(31, "v6", ALL);
}

#[test]
fn lossy_without_sack() {
    with_losses(32, "v4", TIMESTAMPS | SCALING);
}

#[test]
fn lossy_without_anything() {
    with_losses(33, "v4", 0);
}
