//! Sessions of devices that were disabled, revoked or deleted, through whichever node: they end when the change is seen.

use std::time::Duration;

use rand::{SeedableRng as _, rngs::SmallRng};
use seawall_proto::{close::Close, id::DeviceId, record::DeviceState};

use crate::{
    state::State,
    store::{PAGE_MAX, StoreError},
};

/// A handshake that had read the registry before a change is over by then (contract section 3): what became a session meanwhile is
/// looked at again.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(4);

/// Pause before another look at a device whose row can't be read, or whose absence can't be believed.
const UNCLEAR_PAUSE: Duration = Duration::from_secs(30);

/// Looks at the changed devices that have a session here, and ends those that the registry does not want any more.
///
/// # Errors
/// The registry can't be read: they are looked at again.
pub async fn end_unwanted_sessions(state: &State) -> Result<(), StoreError> {
    loop {
        let now = state.clock.now();
        let due = state
            .resume
            .take_changed(now, PAGE_MAX as usize, |device| state.sessions.get(device).is_some());
        if due.is_empty() {
            return Ok(());
        }
        let states = match state.store.device_states(&due).await {
            Ok(states) => states,
            Err(error) => {
                state.resume.note_changed(due, now);
                return Err(error);
            }
        };
        let mut unclear = Vec::new();
        for device in due {
            match states.iter().find(|(known, _)| *known == device) {
                Some((_, Some(registered))) => end_unwanted_session(state, device, Some(*registered)),
                // Its change was recorded, and it is gone: it was deleted.
                None if state.gate.believes_absence() => end_unwanted_session(state, device, None),
                Some((_, None)) | None => unclear.push(device),
            }
        }
        state.resume.note_changed(unclear, now + UNCLEAR_PAUSE);
    }
}

/// `registered` as the registry has it; `None`: the device is not in it.
pub fn end_unwanted_session(state: &State, device: DeviceId, registered: Option<DeviceState>) {
    let order = match registered {
        Some(DeviceState::Enabled) => return,
        Some(DeviceState::Disabled) => Close::disabled(&mut SmallRng::from_os_rng()),
        Some(DeviceState::Revoked) | None => Close::Revoked,
    };
    if let Some(session) = state.sessions.get(device) {
        session.close(order);
    }
}
