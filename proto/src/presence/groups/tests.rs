use super::*;

const TENANT: &str = "acme";

#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    number: u64,
    tenant: Arc<str>,
    address: IpAddr,
}

impl Member for Device {
    fn tenant(&self) -> &Arc<str> {
        &self.tenant
    }

    fn address(&self) -> IpAddr {
        self.address
    }
}

/// Devices of a node, and the group test about them.
struct Rig {
    groups: Groups<Device>,
    devices: Vec<Device>,
    now: Observed,
    health: u8,
    unknown: Vec<(u64, Cause)>,
    released: Vec<u64>,
    changes: Vec<Change>,
}

impl Rig {
    /// `blocks`: number of devices in each block. Devices of even blocks belong to one tenant, the others to another.
    fn new(blocks: &[u64]) -> Self {
        let mut devices = Vec::new();
        for (block, len) in (0_u32..).zip(blocks) {
            for host in 0..u32::try_from(*len).unwrap() {
                let tenant = if block % 2 == 0 { TENANT } else { "other" };
                devices.push((tenant.into(), (block << 12) + host % 4_096));
            }
        }
        Self::of(devices)
    }

    /// Devices by tenant and address.
    fn of(devices: Vec<(Arc<str>, u32)>) -> Self {
        let device = |(number, (tenant, address))| Device {
            number,
            tenant,
            address: std::net::Ipv4Addr::from_bits(address).into(),
        };
        let devices = (0_u64..).zip(devices).map(device).collect();
        Self {
            groups: Groups::default(),
            devices,
            now: at(0),
            health: 0,
            unknown: Vec::new(),
            released: Vec::new(),
            changes: Vec::new(),
        }
    }

    fn silence(&mut self, numbers: impl IntoIterator<Item = u64>) {
        for number in numbers {
            let device = self.devices[usize::try_from(number).unwrap()].clone();
            self.groups.handle_silent(SessionId(number), device);
        }
    }

    fn suspect(&mut self, number: u64) {
        self.groups.handle_suspect(SessionId(number), self.now);
    }

    fn verdict(&self, number: u64) -> Verdict {
        self.groups.verdict(SessionId(number), self.health)
    }

    /// One second, and one step as the gateway takes it.
    fn step(&mut self) {
        self.now = self.now + Duration::from_secs(1);
        let sessions = u32::try_from(self.devices.len()).unwrap();
        if self.groups.begin_step(sessions, self.now) {
            while self.groups.count_some(7) {}
            let counts: Vec<Count> = self
                .groups
                .candidates()
                .into_iter()
                .map(|group| self.count(group))
                .collect();
            self.groups.handle_counts(&counts, sessions, self.health);
        }
        while let Some(held) = self.groups.poll_held(7) {
            self.unknown
                .extend(held.into_iter().map(|(device, cause)| (device.number, cause)));
        }
        let released = self.groups.poll_released(self.health, self.now);
        self.released.extend(released.into_iter().map(|device| device.number));
        while let Some(change) = self.groups.poll_change() {
            self.changes.push(change);
        }
    }

    fn count(&self, group: Group) -> Count {
        let members = self.devices.iter().filter(|device| group.has(*device)).count();
        Count {
            members: u32::try_from(members).unwrap(),
            group,
        }
    }

    fn held(&self) -> Vec<(Group, Cause, u32)> {
        let held = self.changes.iter().filter_map(|change| match change {
            Change::Held(held) => Some((held.group.clone(), held.cause, held.held)),
            Change::Resolving(_) | Change::Released(_) => None,
        });
        held.collect()
    }
}

fn at(seconds: u64) -> Observed {
    Observed::ZERO + Duration::from_secs(seconds)
}

fn block(number: u32) -> Group {
    Group::AddressBlock(Block::V4(number << 12))
}

#[test]
fn silenced_block_is_one_group_and_nobody_goes_offline_before_the_grace() {
    let mut rig = Rig::new(&[300, 300, 300, 300, 300]);
    rig.silence(300..600);
    rig.suspect(300);
    assert_eq!(
        rig.verdict(300),
        Verdict::Wait,
        "nobody is offline before a test has seen it"
    );

    rig.step();

    assert_eq!(rig.held(), [(block(1), Cause::Path, 300)]);
    assert_eq!(rig.unknown.len(), 300, "also those whose deadline is to come");
    assert_eq!(rig.verdict(300), Verdict::Held);
    for _ in 0..298 {
        rig.step();
    }
    assert!(rig.released.is_empty() && rig.changes.len() == 1);
    assert_eq!(rig.groups.unknown(), 300);
}

#[test]
fn those_that_are_left_after_the_grace_go_offline_little_by_little() {
    for (devices, per_step) in [(300, 20), (6_000, 100)] {
        let mut rig = Rig::new(&[devices, 10_000]);
        rig.silence(0..devices);
        rig.suspect(0);
        rig.step();
        let mut most = 0;

        for _ in 0..400 {
            let before = rig.released.len();
            rig.step();
            let released = rig.released[before..].to_vec();
            for number in released {
                assert_eq!(rig.verdict(number), Verdict::Offline);
                rig.groups.handle_ended(SessionId(number));
            }
            most = most.max(rig.released.len() - before);
        }

        assert_eq!((rig.released.len() as u64, most), (devices, per_step));
        assert_eq!(rig.changes.len(), 2, "held, and released");
        assert!(matches!(rig.changes.last(), Some(Change::Released(_))));
        assert!(rig.groups.silent.is_empty() && rig.groups.held.is_empty());
    }
}

#[test]
fn members_that_are_heard_are_resolved_one_by_one_and_end_the_hold() {
    let mut rig = Rig::new(&[100, 1_000]);
    rig.silence(0..100);
    rig.suspect(0);
    rig.step();

    let heard: Vec<Heard> = (0..99)
        .map(|number| rig.groups.handle_heard(SessionId(number)))
        .collect();
    rig.step();
    assert_eq!(heard.iter().filter(|heard| **heard == Heard::Singly).count(), 20);
    assert_eq!(heard.iter().filter(|heard| **heard == Heard::WithGroup).count(), 79);
    assert!(matches!(&rig.changes[1..], [Change::Resolving(held)] if held.resolved == 99));
    rig.step();
    assert_eq!(rig.changes.len(), 2, "once");
    // It has a newer session.
    rig.groups.handle_ended(SessionId(99));
    rig.step();

    let Some(Change::Released(held)) = rig.changes.last() else {
        panic!("released");
    };
    assert_eq!((held.held, held.resolved, held.left), (100, 99, 0));
    assert_eq!(rig.groups.handle_heard(SessionId(0)), Heard::NotHeld);
}

#[test]
fn devices_that_fall_silent_while_their_group_is_held_are_held_with_it() {
    let mut rig = Rig::new(&[100, 1_000]);
    rig.silence(0..50);
    rig.suspect(0);
    rig.step();

    rig.silence(50..80);
    rig.step();

    assert_eq!(rig.unknown.len(), 80);
    assert_eq!(rig.changes.len(), 1, "one event for all");
}

#[test]
fn few_devices_and_small_shares_go_offline_one_by_one() {
    for (blocks, silent) in [(&[19, 1_000][..], 19), (&[1_000, 1_000], 250)] {
        let mut rig = Rig::new(blocks);
        rig.silence(0..silent);
        (0..silent).for_each(|number| rig.suspect(number));

        rig.step();

        assert!(rig.changes.is_empty());
        assert!((0..silent).all(|number| rig.verdict(number) == Verdict::Offline));
    }
}

#[test]
fn widest_group_that_is_silent_as_a_whole_is_named() {
    // A tenant: three blocks of five.
    let mut rig = Rig::new(&[100, 100, 100, 100, 100]);
    rig.silence((0..100).chain(200..300).chain(400..500));
    rig.suspect(0);
    rig.step();
    assert_eq!(rig.held(), [(Group::Tenant(TENANT.into()), Cause::Path, 300)]);

    // The node: it is well, so its network is not.
    let mut rig = Rig::new(&[100, 100, 100, 100, 100]);
    rig.silence(0..490);
    rig.suspect(0);
    rig.step();
    assert_eq!(rig.held(), [(Group::Node, Cause::Path, 490)]);

    // A block that is most of its node.
    let mut rig = Rig::new(&[200, 100, 100]);
    rig.silence(0..200);
    rig.suspect(0);
    rig.step();
    assert_eq!(rig.held(), [(block(0), Cause::Path, 200)]);
}

#[test]
fn two_blocks_of_one_fault_are_held_one_after_the_other() {
    let mut rig = Rig::new(&[100, 500, 500, 100, 500]);
    rig.silence((0..100).chain(1_100..1_200));
    rig.suspect(0);
    rig.suspect(1_100);

    rig.step();
    rig.step();

    assert_eq!(rig.held(), [(block(0), Cause::Path, 100), (block(3), Cause::Path, 100)]);
}

#[test]
fn nobody_is_offline_while_the_blocks_of_one_fault_are_held_one_by_one() {
    let mut rig = Rig::new(&[50; 100]);
    let silent = 0..40 * 50;
    rig.silence(silent.clone());
    silent.clone().for_each(|number| rig.suspect(number));

    for _ in 0..60 {
        rig.step();
        assert!(silent.clone().all(|number| rig.verdict(number) != Verdict::Offline));
    }

    assert_eq!(rig.held().len(), 40);
    assert_eq!(rig.groups.unknown(), 2_000);
}

#[test]
fn grace_that_ends_on_a_lagging_node_goes_on_until_it_is_well() {
    let mut rig = Rig::new(&[100, 1_000]);
    rig.silence(0..100);
    rig.suspect(0);
    rig.step();
    rig.health = HEALTH_LAGGING;

    (0..400).for_each(|_| rig.step());
    assert!(rig.released.is_empty());
    rig.health = 0;
    rig.step();

    assert_eq!(rig.released.len(), 20);
}

#[test]
fn share_that_is_usual_for_a_node_is_no_event() {
    let mut rig = Rig::new(&[100, 100]);
    // For days two devices of five leave pings unanswered.
    rig.silence((0..200).filter(|number| number % 5 < 2));
    for _ in 0..300 {
        rig.now = rig.now + Duration::from_hours(1);
        rig.step();
    }

    rig.suspect(0);
    rig.step();

    assert!(rig.changes.is_empty());
    assert_eq!(rig.verdict(0), Verdict::Offline);
}

#[test]
fn lagging_node_holds_whoever_is_silent_and_publishes_nobody_as_offline() {
    let mut rig = Rig::new(&[1_000]);
    rig.health = HEALTH_LAGGING;
    rig.silence(0..3);
    rig.suspect(0);

    rig.step();

    assert_eq!(rig.held(), [(Group::Node, Cause::NodeLagging, 3)]);
    (0..1_000).for_each(|_| rig.step());
    assert!(rig.released.is_empty(), "it lags on");
    rig.health = 1;
    rig.step();
    assert!(rig.released.is_empty(), "it recovers");
}

#[test]
fn devices_that_were_held_while_the_node_lagged_are_asked_again_once_it_is_well() {
    let mut rig = Rig::new(&[1_000]);
    rig.health = HEALTH_LAGGING;
    rig.silence(0..3);
    rig.suspect(0);
    rig.step();

    rig.health = 0;
    rig.step();

    assert_eq!(rig.released, [0, 1, 2]);
    assert!((0..3).all(|number| rig.verdict(number) == Verdict::AskAgain));
    assert_eq!(rig.groups.unknown(), 3, "nobody knows yet");
    assert_eq!(rig.groups.handle_heard(SessionId(1)), Heard::Singly);
    // The others are silent past their deadlines.
    for number in [0, 2] {
        rig.suspect(number);
        assert_eq!(rig.verdict(number), Verdict::Wait, "no test has seen it since");
    }
    rig.step();
    for number in [0, 2] {
        assert_eq!(rig.verdict(number), Verdict::Offline);
        rig.groups.handle_ended(SessionId(number));
    }
    rig.step();
    assert!(matches!(rig.changes.last(), Some(Change::Released(held)) if held.resolved == 1 && held.left == 0));
    assert_eq!(rig.changes.len(), 2);
}

#[test]
fn path_that_broke_while_the_node_lagged_is_found_once_it_is_well() {
    let mut rig = Rig::new(&[5_000, 10_000]);
    rig.health = HEALTH_LAGGING;
    rig.silence(0..5_000);
    rig.suspect(0);
    rig.step();
    rig.health = 0;

    rig.step();
    assert_eq!(rig.released.len(), 1_000, "not all pings at once");
    (0..10).for_each(|_| rig.step());
    assert_eq!(rig.released.len(), 5_000);
    rig.suspect(0);
    rig.step();

    let tenant = Group::Tenant(TENANT.into());
    assert_eq!(rig.held()[1..], [(tenant, Cause::Path, 5_000)]);
    assert!(matches!(rig.changes.last(), Some(Change::Released(held)) if held.group == Group::Node));
    assert_eq!((rig.groups.unknown(), rig.verdict(4_999)), (5_000, Verdict::Held));
}

#[test]
fn site_behind_one_address_is_a_group() {
    // 30 devices of a site, in a block with 300 others.
    let site = (0..30).map(|_| (TENANT.into(), 7));
    let others = (0..300).map(|host| (TENANT.into(), 100 + host));
    let mut rig = Rig::of(site.chain(others).collect());
    rig.silence(0..30);
    rig.suspect(0);

    rig.step();

    assert_eq!(rig.held(), [(Group::Site(Site::V4(7)), Cause::Path, 30)]);
}

#[test]
fn held_group_names_its_tenants_up_to_a_bound() {
    for (tenants, named) in [(1, Some(1)), (16, Some(16)), (17, None)] {
        let device = |number: u32| (format!("tenant {}", number % tenants).into(), number);
        let mut rig = Rig::of((0..4_000).map(device).collect());
        rig.silence(0..4_000);
        rig.suspect(0);

        rig.step();

        let Some(Change::Held(held)) = rig.changes.first() else {
            panic!("held");
        };
        assert_eq!(held.tenants.as_ref().map(BTreeSet::len), named);
    }
}

#[test]
fn groups_that_can_be_held_are_bounded_and_the_node_holds_what_is_beyond() {
    let mut rig = Rig::new(&[20; 200]);
    for number in 0..u64::try_from(HELD_MAX).unwrap() + 1 {
        let first = number * 40;
        rig.silence(first..first + 20);
        rig.suspect(first);
        rig.step();
    }

    assert_eq!(rig.groups.held().count(), HELD_MAX + 1);
    assert_eq!(rig.held().last(), Some(&(Group::Node, Cause::Path, 20)));
    // Whatever falls silent now belongs to it.
    for number in [1_000, 2_000, 3_000].map(|number| number + 20) {
        rig.silence([number]);
        rig.suspect(number);
    }
    rig.step();
    assert_eq!(rig.groups.held().count(), HELD_MAX + 1);
    assert_eq!((rig.groups.suspects(), rig.verdict(3_020)), (0, Verdict::Held));
}

#[test]
fn blocks_and_sites_have_names() {
    let of = |address: &str| Block::from(address.parse::<IpAddr>().unwrap()).to_string();

    assert_eq!(of("10.1.23.4"), "10.1.16.0/20");
    assert_eq!(of("::ffff:10.1.23.4"), "10.1.16.0/20");
    assert_eq!(of("2001:db8:1:2::3"), "2001:db8:1::/48");
    let site = |address: &str| Site::from(address.parse::<IpAddr>().unwrap()).to_string();
    assert_eq!(site("::ffff:10.1.23.4"), "10.1.23.4");
    assert_eq!(site("2001:db8:1:2::3"), "2001:db8:1:2::/64");
}
