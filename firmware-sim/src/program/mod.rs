//! The program's parts: options, orders, and the loop that prints what the fleet does.

mod limits;
mod options;
mod orders;
mod split;

use std::{fs::File, io::Write, process::ExitCode, time::Duration};

use anyhow::{Context, Error};
use firmware_sim::{
    fleet::{Fleet, FleetConfig, FleetError},
    identity::read_devices,
    messages,
    stats::Stats,
    target::{Target, TargetError},
    tls::Trust,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

pub use self::options::Options;
use self::{
    orders::{Order, orders},
    split::Split,
};

/// Between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(1);

/// A run without an end that was asked for ends after this: a year.
const SECONDS_MAX: u64 = 365 * 24 * 3600;

/// Why the program ends badly.
pub enum Failure {
    /// Exit 2.
    WrongUse(Error),
    /// Exit 1.
    Failed(Error),
}

impl Failure {
    pub const fn error(&self) -> &Error {
        match self {
            Self::WrongUse(error) | Self::Failed(error) => error,
        }
    }

    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::WrongUse(_) => ExitCode::from(2),
            Self::Failed(_) => ExitCode::FAILURE,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<FleetError> for Failure {
    fn from(error: FleetError) -> Self {
        match error {
            FleetError::Mix(_) | FleetError::Profile(_) | FleetError::TooMany(_) => Self::WrongUse(error.into()),
            FleetError::Target(TargetError::BadUrl(_) | TargetError::NoTrust(_)) => Self::WrongUse(error.into()),
            FleetError::Target(TargetError::NoAddress { .. }) => Self::Failed(error.into()),
        }
    }
}

/// Runs the fleet to its end.
pub async fn run(options: Options) -> Result<(), Failure> {
    let mut ends = Ends::new(&options)?;
    let config = configuration(&options)?;
    let mut runner = Runner::start(&options, config).await?;
    let mut printer = Printer { is_json: options.json };
    let mut orders = orders();
    let mut ticks = interval(PROGRESS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = ends.reached() => break,
            _ = ticks.tick() => {
                runner.check()?;
                if printer.print(&runner.stats()).is_err() {
                    // The reader has gone.
                    break;
                }
            }
            order = next_order(&mut orders) => match order {
                Some(Order::Stop) => break,
                Some(order) => {
                    if let Err(error) = runner.obey(&order).await {
                        eprintln!("firmware-sim: {error:#}");
                    }
                }
                // The parent is gone.
                None if options.part.is_some() => break,
                None => orders = None,
            },
        }
    }
    let last = runner.stop().await?;
    let _ = printer.print(&last);
    Ok(())
}

fn configuration(options: &Options) -> Result<FleetConfig, Failure> {
    let path = &options.devices;
    let file = File::open(path).with_context(|| format!("opening the devices file {}", path.display()))?;
    let devices =
        read_devices(file, options.lines()).with_context(|| format!("reading the devices file {}", path.display()))?;
    let mut config = FleetConfig::new(&options.url, devices, options.firmware_mix.clone());
    config.trust = Trust::in_file(options.ca.clone());
    config.profiles = options.profiles();
    config.per_second = options.rate();
    config.sources = options.source.clone();
    config.seed = options.seed;
    config.messages_every = messages::every(options.messages_per_minute);
    if let Some(part) = &options.part {
        config.part = part.clone();
    }
    Ok(config)
}

/// What ends the program from outside. In a part of a split fleet the parent decides, so that a Ctrl-C, which the terminal
/// sends to all processes, does not break the parts away one by one.
struct Ends {
    interrupt: Signal,
    terminate: Signal,
    deadline: Instant,
    is_part: bool,
}

impl Ends {
    fn new(options: &Options) -> Result<Self, Error> {
        let seconds = options.seconds.unwrap_or(SECONDS_MAX).min(SECONDS_MAX);
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).context("listening for Ctrl-C")?,
            terminate: signal(SignalKind::terminate()).context("listening for SIGTERM")?,
            deadline: Instant::now() + Duration::from_secs(seconds),
            is_part: options.part.is_some(),
        })
    }

    /// # Cancel safety
    /// Safe: a signal is not lost.
    async fn reached(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv(), if !self.is_part => {}
            _ = self.terminate.recv() => {}
            () = sleep_until(self.deadline), if !self.is_part => {}
        }
    }
}

/// The fleet, here or in parts.
enum Runner {
    Here(Box<Fleet>),
    Split(Split),
}

impl Runner {
    async fn start(options: &Options, config: FleetConfig) -> Result<Self, Failure> {
        let per_process = limits::devices_per_process(&config.profiles)?;
        if options.part.is_none() && config.devices.len() > per_process {
            // Faults of the fleet are reported once, here.
            config.check()?;
            Target::resolve_trusting(&config.url, &config.trust)
                .await
                .map_err(FleetError::from)?;
            return Ok(Self::Split(Split::start(config.devices.len(), per_process)?));
        }
        Ok(Self::Here(Box::new(Fleet::start(config).await?)))
    }

    fn stats(&self) -> Stats {
        match self {
            Self::Here(fleet) => fleet.stats(),
            Self::Split(split) => split.stats(),
        }
    }

    fn check(&mut self) -> Result<(), Error> {
        match self {
            Self::Here(_) => Ok(()),
            Self::Split(split) => split.check(),
        }
    }

    async fn obey(&mut self, order: &Order) -> Result<(), Error> {
        match (self, order) {
            (Self::Split(split), order) => split.pass_on(order).await,
            (Self::Here(fleet), Order::Drop) => {
                fleet.drop_all();
                Ok(())
            }
            (Self::Here(fleet), Order::Firmware { version, share }) => fleet
                .set_share(version, *share)
                .map(drop)
                .context("the order `firmware`"),
            (Self::Here(_), Order::Unknown(line)) => Err(orders::unknown(line)),
            // The loop has taken it.
            (Self::Here(_), Order::Stop) => Ok(()),
        }
    }

    async fn stop(self) -> Result<Stats, Error> {
        match self {
            Self::Here(fleet) => Ok(fleet.stop().await),
            Self::Split(split) => split.stop().await,
        }
    }
}

struct Printer {
    is_json: bool,
}

impl Printer {
    fn print(&mut self, stats: &Stats) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        if self.is_json {
            serde_json::to_writer(&mut out, stats)?;
            writeln!(out)?;
        } else {
            writeln!(out, "{stats}")?;
        }
        out.flush()
    }
}

/// `None`: standard input has ended. Waits for ever once that is known.
async fn next_order(orders: &mut Option<mpsc::Receiver<Order>>) -> Option<Order> {
    match orders {
        Some(orders) => orders.recv().await,
        None => std::future::pending().await,
    }
}
