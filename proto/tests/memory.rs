//! What slots cost in memory, and that nobody can make them cost more. A binary of its own: it counts bytes.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use seawall_proto::{
    admission::{Admission, AdmissionConfig, Arrival, CohortTag, Decision},
    id::{DeviceId, Network, Proof},
    slots::SlotKeys,
    time::{Instant, WallTime},
};
use uuid::Uuid;

/// As docs/CONFIG.md says of `admission.slots_max` and `admission.known_max`, in bytes.
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

/// An admission whose registry is away: everybody gets a slot.
struct Node {
    admission: Admission<()>,
    rng: SmallRng,
    refused: u64,
}

impl Node {
    fn new() -> Self {
        let keys = SlotKeys::new(1, [7; 32]);
        let mut admission = Admission::<()>::new(AdmissionConfig::default(), keys, Instant::ZERO);
        admission.handle_registry_absent(Instant::ZERO);
        Self {
            admission,
            rng: SmallRng::seed_from_u64(1),
            refused: 0,
        }
    }

    /// 10,000 of them a second.
    fn refuse(&mut self, device: DeviceId) {
        let now = Instant::from_micros(self.refused * 100);
        self.refused += 1;
        let arrival = Arrival {
            device,
            cohort: CohortTag::of(None, None),
            slot_token: None,
            arrived: now,
            is_known_absent: false,
            proof: Proof::Secret,
            network: Network::V4(1),
        };
        let wall = WallTime::from_unix_ms(1_800_000_000_000 + now.as_micros() / 1_000);
        let decision = self.admission.attempt(&arrival, now, wall, &mut self.rng);
        assert!(matches!(decision, Decision::Refused(refused) if refused.hint.slot.is_some()));
    }

    fn random_device(&mut self) -> DeviceId {
        DeviceId::from_uuid(Uuid::from_u128(self.rng.random()))
    }
}

/// Bytes that `work` leaves behind.
fn kept(work: impl FnOnce()) -> usize {
    let before = LIVE.load(Ordering::Relaxed);
    work();
    LIVE.load(Ordering::Relaxed).saturating_sub(before)
}

/// One test: bytes are counted for the whole process.
#[test]
fn slots_cost_what_the_documents_say_and_two_million_random_ids_no_more() {
    let mut node = Node::new();
    let devices: Vec<DeviceId> = (0..200_000).map(|_| node.random_device()).collect();

    let of_known = kept(|| {
        for device in &devices {
            node.admission.handle_admitted(*device, "acme");
        }
    });
    let of_slots = kept(|| {
        for device in &devices {
            node.refuse(*device);
        }
    });
    let strangers_max = AdmissionConfig::default().slots_max / 4;
    let of_strangers = kept(|| {
        for _ in 0..2_000_000 {
            let stranger = node.random_device();
            node.refuse(stranger);
        }
    });
    let state = node.admission.state(Instant::from_micros(node.refused * 100));

    let each = |bytes: usize| bytes / devices.len();
    println!(
        "{} B a slot, {} B a known device, {} MiB of strangers",
        each(of_slots),
        each(of_known),
        of_strangers >> 20
    );
    assert!(each(of_slots) <= SLOT_BYTES_MAX, "{}", each(of_slots));
    assert!(each(of_known) <= KNOWN_BYTES_MAX, "{}", each(of_known));
    assert!(state.slots <= strangers_max + devices.len(), "{state:?}");
    assert!(state.slots_stateless > 0, "what finds no room lives in its token");
    assert!(of_strangers <= strangers_max * 2 * SLOT_BYTES_MAX, "{of_strangers}");
}
