//! Admission of a device to the node's resources, before any are used for it: its share of the node's connections, and
//! memory. Start with [`take`].

use std::time::Duration;

use seawall_proto::{
    hello::Hello,
    id::{Credential, CredentialTag},
    refusal::Refusal,
};

use super::throttled;
use crate::{
    edge::{
        address::{Network, Share},
        limiter::{ConnectionLimiter, Rejected},
    },
    node::Shared,
    runtime::memory::Room,
};

/// Minimum hint of a full node.
const NODE_FULL_FOR: Duration = Duration::from_secs(30);

/// `share` is the result of accepting the connection.
///
/// # Errors
/// The refusal if there is no room.
pub(super) fn take(
    shared: &Shared,
    limiter: &ConnectionLimiter,
    share: &mut Result<Share, Rejected>,
    hello: &Hello,
    network: Network,
) -> Result<Room, Refusal> {
    let is_by_pace = |rejected: &Rejected| rejected.is_by_pace();
    if share.as_ref().is_err_and(is_by_pace) && is_awaited(shared, hello, network) {
        *share = limiter.readmit(network);
    }
    let room = match share {
        Ok(_) => take_memory(shared, hello),
        Err(rejected) => Err(*rejected),
    };
    room.map_err(|rejected| match rejected {
        Rejected::NodeFull => {
            let slot = hello.slot.as_deref();
            Refusal::overloaded(shared.lookups.slot_for_rejected(hello.device, slot, NODE_FULL_FOR))
        }
        Rejected::Address(limit) => throttled(limiter, limit),
    })
}

/// Whether a device proves by a token that it returns at its slot, or resumes its session. The rate limits of its
/// address then do not apply. Its credential is verified later.
fn is_awaited(shared: &Shared, hello: &Hello, network: Network) -> bool {
    let is_at_its_slot = |(credential, token): (&Credential, &str)| {
        let shown = (hello.device, CredentialTag::from(credential));
        shared.lookups.is_at_its_slot(shown, token, network)
    };
    let shown = hello.credential.as_ref().zip(hello.slot.as_deref());
    shared.resume.is_shown_by(hello, &shared.clock) || shown.is_some_and(is_at_its_slot)
}

/// Acquires memory for a device. Unknown devices hold at most half of it until they are decided on. A device that is
/// online here needs none: it can only replace its own session.
fn take_memory(shared: &Shared, hello: &Hello) -> Result<Room, Rejected> {
    let memory = &shared.memory;
    let is_its_turn = !memory.is_crowded()
        || shared.lookups.is_known(hello.device, hello.slot.as_deref())
        || shared.resume.is_shown_by(hello, &shared.clock);
    let room = if is_its_turn { memory.take() } else { None };
    let room = room.or_else(|| {
        let is_online = shared.sessions.get(hello.device).is_some();
        is_online.then(|| memory.take_to_replace()).flatten()
    });
    room.ok_or_else(|| {
        shared.metrics.memory_refusals.increment(1);
        Rejected::NodeFull
    })
}
