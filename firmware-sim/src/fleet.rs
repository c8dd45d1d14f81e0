//! A fleet in this process: thousands of simulated devices with shares of versions and behaviours, and their figures.

use std::{
    net::IpAddr,
    num::NonZeroU32,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use seawall_proto::id::Label;

use crate::{
    backoff::{FIRST_RETURN_MAX, up_to},
    device::Patience,
    driver::{DeviceHandle, DeviceSpec, Driver},
    identity::Identity,
    mix::{Deal, Mix, MixError, Share},
    profile::{Profile, UnknownProfile},
    recorder::Recorder,
    stats::Stats,
    target::{Sources, Target, TargetError},
    tls::Trust,
};

/// Devices in one process: with what else it opens, below the 20,000 files that systems commonly allow.
pub const DEVICES_PER_PROCESS_MAX: usize = 18_000;

/// The version of devices that name none, as in docs/VERSIONS.md.
pub const VERSION_NONE: &str = "(none)";

/// What fleet to start.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// `ws://host:port[/path]`.
    pub url: String,
    /// CAs that verify a gateway at `wss://`.
    pub trust: Trust,
    /// The whole fleet, even where this process runs a part of it: shares are of the whole.
    pub devices: Vec<Identity>,
    /// Which of them run here. Default all.
    pub part: Range<usize>,
    /// Versions; [`VERSION_NONE`] for devices that name none.
    pub firmware: Mix,
    /// Behaviours, by the names of [`Profile`].
    pub profiles: Mix,
    /// Devices that begin in a second, in file order, whether or not the gateway keeps up. `None`: all begin at once.
    pub per_second: Option<NonZeroU32>,
    /// Local addresses. Default: see [`Sources::new`].
    pub sources: Vec<IpAddr>,
    /// Of all chance. The same seed deals and draws the same.
    pub seed: u64,
    /// How long attempts may take.
    pub patience: Patience,
    /// Between two messages that a device sends while it is connected. Default none.
    pub messages_every: Option<Duration>,
}

impl FleetConfig {
    /// A well-behaved fleet, all of it here, all at once.
    #[must_use]
    pub fn new(url: &str, devices: Vec<Identity>, firmware: Mix) -> Self {
        Self {
            url: url.into(),
            trust: Trust::default(),
            part: 0..devices.len(),
            devices,
            firmware,
            profiles: Mix::all("well-behaved"),
            per_second: None,
            sources: Vec::new(),
            seed: 0,
            patience: Patience::default(),
            messages_every: None,
        }
    }

    /// Says whether the whole fleet makes sense, without starting it or looking for the gateway.
    ///
    /// # Errors
    /// Unknown profiles, versions that are none, or counts that do not fit.
    pub fn check(&self) -> Result<(), FleetError> {
        for version in self.firmware.names() {
            check_version(version)?;
        }
        self.profile_list()?;
        self.firmware.counts(self.devices.len())?;
        self.profiles.counts(self.devices.len())?;
        Ok(())
    }

    fn profile_list(&self) -> Result<Vec<Profile>, FleetError> {
        Ok(self.profiles.names().map(str::parse).collect::<Result<_, _>>()?)
    }
}

/// A running fleet.
///
/// Dropped without [`stop`](Self::stop), its devices live on until the runtime ends.
#[derive(Debug)]
pub struct Fleet {
    driver: Driver,
    recorder: Arc<Recorder>,
    devices: Vec<Simulated>,
    deal: Mutex<(Deal, StdRng)>,
}

#[derive(Debug)]
struct Simulated {
    /// Its place in the whole fleet; twins of a duplicate id have the same.
    place: usize,
    handle: DeviceHandle,
}

impl Fleet {
    /// Starts the devices. They keep trying if there is no gateway.
    ///
    /// # Errors
    /// A bad URL, unknown profiles, versions that are none, counts that do not fit, or more than
    /// [`DEVICES_PER_PROCESS_MAX`] devices here.
    pub async fn start(config: FleetConfig) -> Result<Self, FleetError> {
        let total = config.devices.len();
        let target = Target::resolve_trusting(&config.url, &config.trust).await?;
        for version in config.firmware.names() {
            check_version(version)?;
        }
        let profiles = config
            .profiles
            .names()
            .map(str::parse)
            .collect::<Result<Vec<Profile>, _>>()?;
        let firmware = Deal::new(&config.firmware, total, config.seed)?;
        let behaviour = Deal::new(&config.profiles, total, config.seed ^ PROFILE_SALT)?;
        let plan: Vec<(usize, Profile)> = config
            .part
            .clone()
            .take_while(|place| *place < total)
            .filter_map(|place| Some((place, *profiles.get(behaviour.index_of(place))?)))
            .flat_map(|(place, profile)| std::iter::repeat_n((place, profile), profile.devices_per_identity()))
            .collect();
        if plan.len() > DEVICES_PER_PROCESS_MAX {
            return Err(FleetError::TooMany(plan.len()));
        }

        let versions_here = plan.iter().map(|(place, _)| firmware.index_of(*place));
        let recorder = Arc::new(Recorder::new(firmware.names(), versions_here));
        let driver = Driver::new(target.clone(), Arc::clone(&recorder) as _);
        let sources = Sources::new(config.sources);
        let mut seeds = StdRng::seed_from_u64(config.seed.wrapping_add(config.part.start as u64));
        let devices = plan
            .into_iter()
            .enumerate()
            .map(|(number, (place, profile))| Simulated {
                place,
                handle: driver.spawn(DeviceSpec {
                    number,
                    identity: config.devices[place].clone(),
                    firmware: named(&firmware.names()[firmware.index_of(place)]),
                    profile,
                    first_attempt_after: Some(begin(place, config.per_second)),
                    source: sources.of(place, &target),
                    seed: seeds.random(),
                    patience: config.patience,
                    messages_every: config.messages_every,
                    resumes: true,
                }),
            })
            .collect();
        Ok(Self {
            driver,
            recorder,
            devices,
            deal: Mutex::new((firmware, StdRng::seed_from_u64(seeds.random()))),
        })
    }

    /// What the fleet does now.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.recorder
            .stats(self.driver.now().saturating_since(seawall_proto::time::Instant::ZERO))
    }

    /// Every connection of the fleet breaks at once: resets, no close frames. Devices that wait continue to wait.
    pub fn drop_all(&self) {
        for device in &self.devices {
            device.handle.drop_connection();
        }
    }

    /// Gives a version this share of the whole fleet. The devices that change restart, spread over 5 s, as devices do
    /// that were updated. Returns how many of them are here.
    ///
    /// # Errors
    /// No version, too many versions, or none to go back to.
    pub fn set_share(&self, version: &str, share: Share) -> Result<usize, MixError> {
        check_version(version)?;
        let mut deal = self.deal.lock().unwrap_or_else(PoisonError::into_inner);
        let (deal, rng) = &mut *deal;
        deal.add_name(version)?;
        let mut changed = deal.set_share(version, share)?;
        changed.sort_unstable();
        let mut here = 0;
        for (number, device) in self.devices.iter().enumerate() {
            if changed.binary_search(&device.place).is_ok() {
                let version = &deal.names()[deal.index_of(device.place)];
                self.recorder.set_version(number, version);
                device.handle.upgrade(named(version), up_to(FIRST_RETURN_MAX, rng));
                here += 1;
            }
        }
        Ok(here)
    }

    /// Says goodbye for every device, and returns the figures from before. Takes about a second.
    pub async fn stop(self) -> Stats {
        let stats = self.stats();
        self.driver.stop().await;
        stats
    }
}

/// Keeps who behaves how apart from who runs what.
const PROFILE_SALT: u64 = 0x7072_6f66_696c_6573;

fn begin(place: usize, per_second: Option<NonZeroU32>) -> Duration {
    per_second.map_or(Duration::ZERO, |rate| Duration::from_secs(place as u64) / rate.get())
}

fn named(version: &Arc<str>) -> Option<Arc<str>> {
    (&**version != VERSION_NONE).then(|| Arc::clone(version))
}

fn check_version(version: &str) -> Result<(), MixError> {
    match Label::parse(version) {
        Ok(Some(_)) => Ok(()),
        Ok(None) | Err(_) => Err(MixError::BadVersion(version.into())),
    }
}

/// A fleet that can't be started.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Mix(#[from] MixError),
    #[error(transparent)]
    Profile(#[from] UnknownProfile),
    #[error("{0} devices are more than the 18,000 that one process runs")]
    TooMany(usize),
}
