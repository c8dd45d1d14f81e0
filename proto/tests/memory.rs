//! Memory of slots, and its bound whatever clients do. A separate binary, because it counts bytes.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use seawall_proto::{
    admission::{Admission, AdmissionConfig, Arrival, CohortTag, Decision, Registry},
    id::{Credential, DeviceId, Network, SecretHash},
    slots::{SlotKeys, Slots},
    time::{Instant, WallTime},
};
use uuid::Uuid;

/// The figures of docs/CONFIG.md for `admission.slots_max` and `admission.known_max`, in bytes.
const SLOT_BYTES_MAX: usize = 75;
const KNOWN_BYTES_MAX: usize = 65;

static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[expect(
    unsafe_code,
    reason = "an allocator can't be written without; each call is passed on unchanged"
)]
// SAFETY: all work is the system allocator's; counting touches an atomic and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `pointer` came from `System.alloc` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An admission whose registry is away: every device gets a slot.
struct Node {
    admission: Admission<(), ()>,
    slots: Slots,
    rng: SmallRng,
    refused: u64,
}

impl Node {
    fn new() -> Self {
        let config = AdmissionConfig::default();
        let slots = Slots::new(&config.slots(), SlotKeys::new(1, [7; 32]));
        let mut admission = Admission::new(config, Instant::ZERO);
        admission.handle_registry(Registry::Absent, Instant::ZERO);
        Self {
            admission,
            slots,
            rng: SmallRng::seed_from_u64(1),
            refused: 0,
        }
    }

    /// 10,000 devices per second.
    fn refuse(&mut self, device: DeviceId) {
        let now = Instant::from_micros(self.refused * 100);
        self.refused += 1;
        let arrival = Arrival {
            device,
            cohort: CohortTag::of(None, None),
            slot_token: None,
            arrived: now,
            is_known_absent: false,
            credential: (&Credential::from(SecretHash::of(b"a secret"))).into(),
            network: Network::V4(1),
        };
        let wall = WallTime::from_unix_ms(1_800_000_000_000 + now.as_micros() / 1_000);
        let decision = self
            .admission
            .attempt(&arrival, || (), &mut self.slots, (now, wall), &mut self.rng);
        assert!(matches!(decision, Decision::Refused(refused) if refused.hint.slot.is_some()));
    }

    fn random_device(&mut self) -> DeviceId {
        DeviceId::from_uuid(Uuid::from_u128(self.rng.random()))
    }
}

/// Bytes still allocated after `work`.
fn kept(work: impl FnOnce()) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    work();
    LIVE.load(Ordering::Relaxed).saturating_sub(before)
}

/// A single test, because bytes are counted for the whole process.
#[test]
fn slots_cost_what_the_documents_say_and_two_million_random_ids_no_more() {
    let mut node = Node::new();
    let devices: Vec<DeviceId> = (0..200_000).map(|_| node.random_device()).collect();

    let of_known = kept(|| {
        for device in &devices {
            node.slots.handle_admitted(*device, "acme");
        }
    });
    let of_slots = kept(|| {
        for device in &devices {
            node.refuse(*device);
        }
    });
    let unknown_max = AdmissionConfig::default().slots_max / 4;
    let of_unknown = kept(|| {
        for _ in 0..2_000_000 {
            let unknown = node.random_device();
            node.refuse(unknown);
        }
    });
    let state = node.slots.state();

    let each = |bytes: usize| bytes / devices.len();
    println!(
        "{} B a slot, {} B a known device, {} MiB of unknown devices",
        each(of_slots),
        each(of_known),
        of_unknown >> 20
    );
    assert!(each(of_slots) <= SLOT_BYTES_MAX, "{}", each(of_slots));
    assert!(each(of_known) <= KNOWN_BYTES_MAX, "{}", each(of_known));
    assert!(state.remembered <= unknown_max + devices.len(), "{state:?}");
    assert!(state.stateless > 0, "slots without room are in their tokens only");
    assert!(of_unknown <= unknown_max * 2 * SLOT_BYTES_MAX, "{of_unknown}");
}
