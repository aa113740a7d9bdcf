//! The rules of a gate. They say what the eBPF program of criu-ebpf/src/gate.rs says:
//!
//! ```text
//! table inet criu-ebpf-NAME {
//!     set to4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; counter }      # ours . the peer's
//!     set from4 { … }                                                                    # likewise
//!     set asked4 { type ipv4_addr . inet_service; counter }                              # ours
//!     chain in { type filter hook input priority raw;
//!         meta mark 0xc114 accept
//!         meta l4proto != tcp accept
//!         meta nfproto ipv4 ip saddr . tcp sport . ip daddr . tcp dport @to4 drop
//!         meta nfproto ipv4 ip daddr . tcp dport . ip saddr . tcp sport @from4 drop
//!         tcp flags & (syn | ack) == syn ip daddr . tcp dport @asked4 drop
//!         ip daddr 127.0.0.0/8 tcp flags & (syn | ack) == syn 127.0.0.1 . tcp dport @asked4 drop
//!         …                                                                              # the same for IPv6
//!     }
//!     chain out { type filter hook output priority raw; … }                              # the same rules
//! }
//! ```
//!
//! A packet between two programs of one machine comes through both chains.

use std::ffi::CStr;

use criu_common::gate::MARK;
use netlink_bindings::nftables::{
    Chained, CmpOps, MetaKeys, PayloadBase, PushExprListAttrs, Registers, TableFlags, VerdictCode,
};
use netlink_bindings::traits::Pusher;
use netlink_bindings::utils::push_header;

use super::batch::inet;

/// NF_INET_LOCAL_IN, NF_INET_LOCAL_OUT, NF_IP_PRI_RAW of include/uapi/linux/netfilter*.h.
const CHAINS: [(&CStr, u32); 2] = [(c"in", 1), (c"out", 3)];
const RAW: i32 = -300;
/// Where registers of four bytes begin: keys are put together from there on.
const KEY: u32 = Registers::Reg3200 as u32;
const SYN: u8 = 2;
const ACK: u8 = 16;
const LOOPBACK: [u8; 4] = [127, 0, 0, 1];

/// What differs between the families.
#[derive(Debug)]
pub(super) struct Family {
    /// NFPROTO_IPV4, NFPROTO_IPV6.
    number: u8,
    /// Bytes of an address.
    pub(super) address: usize,
    /// Where packets have the sender's and the receiver's.
    at: [u32; 2],
    /// How nft(8) calls the type of an address: TYPE_IPADDR, TYPE_IP6ADDR.
    kind: u32,
    /// The set of connections as packets to the peer have them.
    pub(super) to: &'static CStr,
    /// The one for packets from the peer.
    pub(super) from: &'static CStr,
    /// The one of ends that nobody may ask for a connection with.
    pub(super) asked: &'static CStr,
}

pub(super) const V4: Family =
    Family { number: 2, address: 4, at: [12, 16], kind: 7, to: c"to4", from: c"from4", asked: c"asked4" };
pub(super) const V6: Family =
    Family { number: 10, address: 16, at: [8, 24], kind: 8, to: c"to6", from: c"from6", asked: c"asked6" };

/// Bytes of a port in a key, filled up to a register.
const PORT: usize = 4;

impl Family {
    /// Bytes of a connection's key.
    pub(super) fn pair(&self) -> usize {
        2 * (self.address + PORT)
    }

    /// The sets: names, lengths of keys, and how nft(8) calls their types.
    fn sets(&self) -> [(&'static CStr, usize, u32); 3] {
        /// TYPE_INET_SERVICE, and bits of a type within a type of several.
        const SERVICE: u32 = 13;
        const BITS: u32 = 6;
        let end = self.kind << BITS | SERVICE;
        let pair = end << (2 * BITS) | end;
        [(self.to, self.pair(), pair), (self.from, self.pair(), pair), (self.asked, self.pair() / 2, end)]
    }
}

/// Makes a gate that holds nothing.
pub(super) fn make(batch: &mut Chained<'_>, table: &CStr, owned: bool) {
    let flags = if owned { TableFlags::Owner as u32 } else { 0 };
    batch.request().set_create().set_excl().op_newtable_do(&inet()).encode().push_name(table).push_flags(flags);
    let sets = [V4, V6].iter().flat_map(Family::sets).collect::<Vec<_>>();
    for ((name, len, kind), id) in sets.into_iter().zip(1..) {
        let mut request = batch.request().set_create().op_newset_do(&inet());
        let set = request.encode().push_table(table).push_name(name).push_flags(0).push_key_type(kind);
        let _ = set.push_key_len(len as u32).push_id(id).nested_expr().nested_data_counter();
    }
    for (chain, hook) in CHAINS {
        let mut request = batch.request().set_create().op_newchain_do(&inet());
        let made = request.encode().push_table(table).push_name(chain).push_type(c"filter");
        let _ = made.nested_hook().push_num(hook).push_priority(RAW);
        rules(batch, table, chain);
    }
}

fn rules(batch: &mut Chained<'_>, table: &CStr, chain: &CStr) {
    const EQ: u32 = CmpOps::Eq as u32;
    rule(batch, table, chain, |e| {
        let marked = e.meta(MetaKeys::Mark).compare(EQ, &MARK.to_ne_bytes());
        marked.verdict(VerdictCode::Accept)
    });
    rule(batch, table, chain, |e| {
        let other = e.meta(MetaKeys::L4Proto).compare(CmpOps::Neq as u32, &[libc::IPPROTO_TCP as u8]);
        other.verdict(VerdictCode::Accept)
    });
    for family in [V4, V6] {
        let words = family.address as u32 / 4;
        let [sender, receiver] = family.at;
        // Ports begin TCP's header: the sender's, the receiver's.
        for (set, [our, our_port, their, their_port]) in
            [(family.to, [sender, 0, receiver, 2]), (family.from, [receiver, 2, sender, 0])]
        {
            rule(batch, table, chain, |e| {
                e.meta(MetaKeys::Nfproto)
                    .compare(EQ, &[family.number])
                    .load(PayloadBase::NetworkHeader, our, family.address, KEY)
                    .load(PayloadBase::TransportHeader, our_port, 2, KEY + words)
                    .load(PayloadBase::NetworkHeader, their, family.address, KEY + words + 1)
                    .load(PayloadBase::TransportHeader, their_port, 2, KEY + 2 * words + 1)
                    .among(set)
                    .verdict(VerdictCode::Drop)
            });
        }
        rule(batch, table, chain, |e| {
            e.asks(&family)
                .load(PayloadBase::NetworkHeader, receiver, family.address, KEY)
                .load(PayloadBase::TransportHeader, 2, 2, KEY + words)
                .among(family.asked)
                .verdict(VerdictCode::Drop)
        });
    }
    // One address stands for all of 127/8.
    rule(batch, table, chain, |e| {
        let loopback = e.asks(&V4).load(PayloadBase::NetworkHeader, V4.at[1], 1, KEY).compare(EQ, &LOOPBACK[..1]);
        let key = loopback.put(&LOOPBACK, KEY).load(PayloadBase::TransportHeader, 2, 2, KEY + 1);
        key.among(V4.asked).verdict(VerdictCode::Drop)
    });
}

/// Adds a rule to the end of a chain.
fn rule(
    batch: &mut Chained<'_>,
    table: &CStr,
    chain: &CStr,
    expressions: impl for<'b> FnOnce(Expressions<&'b mut Vec<u8>>) -> Expressions<&'b mut Vec<u8>>,
) {
    let mut request = batch.request().set_create().set_append().op_newrule_do(&inet());
    let rule = request.encode().push_table(table).push_chain(chain);
    let mut list = rule.nested_expressions();
    expressions(Expressions(PushExprListAttrs::new(list.as_vec_mut())));
}

/// The expressions of a rule, in the order in which a packet meets them.
struct Expressions<P: Pusher>(PushExprListAttrs<P>);

impl<P: Pusher> Expressions<P> {
    /// Loads what the kernel knows of a packet besides its bytes.
    fn meta(self, key: MetaKeys) -> Self {
        Self(self.0.nested_elem().nested_data_meta().push_key(key as u32).push_dreg(KEY).end_nested().end_nested())
    }

    /// Loads bytes of a packet.
    fn load(self, base: PayloadBase, offset: u32, len: usize, into: u32) -> Self {
        let load = self.0.nested_elem().nested_data_payload().push_dreg(into).push_base(base as u32);
        Self(load.push_offset(offset).push_len(len as u32).end_nested().end_nested())
    }

    /// Puts bytes into registers.
    fn put(self, bytes: &[u8], into: u32) -> Self {
        let put = self.0.nested_elem().nested_data_immediate().push_dreg(into);
        Self(put.nested_data().push_value(bytes).end_nested().end_nested().end_nested())
    }

    /// Goes on if what was loaded first compares like this with `bytes`.
    fn compare(self, op: u32, bytes: &[u8]) -> Self {
        let compare = self.0.nested_elem().nested_data_cmp().push_sreg(KEY).push_op(op);
        Self(compare.nested_data().push_value(bytes).end_nested().end_nested().end_nested())
    }

    /// Goes on if a packet of this family asks for a connection.
    fn asks(self, family: &Family) -> Self {
        /// Where TCP's header has its flags.
        const FLAGS: u32 = 13;
        const EQ: u32 = CmpOps::Eq as u32;
        let flags = self.meta(MetaKeys::Nfproto).compare(EQ, &[family.number]);
        let flags = flags.load(PayloadBase::TransportHeader, FLAGS, 1, KEY).0.nested_elem().nested_data_bitwise();
        let masked = flags.push_sreg(KEY).push_dreg(KEY).push_len(1);
        let masked = masked.nested_mask().push_value(&[SYN | ACK]).end_nested();
        let masked = masked.nested_xor().push_value(&[0]).end_nested();
        Self(masked.end_nested().end_nested()).compare(EQ, &[SYN])
    }

    /// Goes on if the key that was put together is in a set.
    fn among(self, set: &CStr) -> Self {
        /// NFTA_LOOKUP_SREG. The crate counts this attribute as the specification beside the kernel's source does (3), not
        /// as the kernel does (include/uapi/linux/netfilter/nf_tables.h).
        const SOURCE: u16 = 2;
        let mut lookup = self.0.nested_elem().nested_data_lookup().push_set(set);
        push_header(lookup.as_vec_mut(), SOURCE, size_of_val(&KEY) as u16);
        lookup.as_vec_mut().extend(KEY.to_be_bytes());
        Self(lookup.end_nested().end_nested())
    }

    /// What becomes of the packets that have come this far.
    fn verdict(self, verdict: VerdictCode) -> Self {
        let end = self.0.nested_elem().nested_data_immediate().push_dreg(Registers::RegVerdict as u32);
        let end = end.nested_data().nested_verdict().push_code(verdict as u32);
        Self(end.end_nested().end_nested().end_nested().end_nested())
    }
}
