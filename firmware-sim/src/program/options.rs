//! The command line.

use std::{net::IpAddr, num::NonZeroU32, ops::Range, path::PathBuf};

use clap::Parser;
use firmware_sim::{identity::Lines, messages::PER_MINUTE_MAX, mix::Mix, profile::Profile};

/// Simulated devices against a Seawall gateway.
///
/// Prints a line per second. Orders on standard input, if it is not a terminal, one per line: `drop` (every connection breaks at once),
/// `firmware 3.8.0-b3=25%` (that share of the fleet is updated, and starts anew), `stop`.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Options {
    /// The gateway's device listener, ws://host:port or wss://host:port; the path defaults to /v1/connect, and `{device}` in it stands
    /// for the device's id
    #[arg(long, value_name = "URL")]
    pub url: String,

    /// CA certificates (PEM) to trust for a gateway at wss:// [default: the system's]
    #[arg(long, value_name = "FILE")]
    pub ca: Option<PathBuf>,

    /// CSV with a header: id,secret and optionally tenant,model, as `seawall devices seed` writes it
    #[arg(long, value_name = "FILE")]
    pub devices: PathBuf,

    /// Versions and their shares, in percent or in devices; `(none)` for devices that name no version
    #[arg(long, value_name = "MIX", default_value = "1.0.0")]
    pub firmware_mix: Mix,

    /// How all devices behave: well-behaved, fixed-Ns, immediate, ignores-hints, exponential-no-jitter, patient,
    /// slow-reader, half-open, flapping, duplicate-id
    #[arg(
        long,
        value_name = "NAME",
        default_value = "well-behaved",
        conflicts_with = "profile_mix"
    )]
    pub profile: Profile,

    /// Several behaviours and their shares: 'well-behaved=80%,fixed-5s=20%'
    #[arg(long, value_name = "MIX", value_parser = profile_mix)]
    pub profile_mix: Option<Mix>,

    /// End after this many seconds; without it, at Ctrl-C or SIGTERM
    #[arg(long, value_name = "N")]
    pub seconds: Option<u64>,

    /// Devices that begin in a second, in file order, whether or not the gateway keeps up; 0: all at once
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub rate: u32,

    /// Pass over this many devices of the file
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub offset: usize,

    /// Take at most this many devices of the file
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,

    /// Local address to connect from, in turn where there are several; default on loopback: 127.0.0.1 and its neighbours
    #[arg(long, value_name = "IP")]
    pub source: Vec<IpAddr>,

    /// Messages that each device sends in a minute while it is connected, at equal distances: 0 to 6000
    #[arg(long, value_name = "N", default_value_t = 0.0, value_parser = messages_per_minute)]
    pub messages_per_minute: f64,

    /// Seed of all chance
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,

    /// One JSON object a second instead of a line for people
    #[arg(long, overrides_with = "json")]
    pub json: bool,

    /// The part of a split fleet that this process runs: FIRST..END
    #[arg(long, hide = true, value_parser = part)]
    pub part: Option<Range<usize>>,
}

impl Options {
    pub fn lines(&self) -> Lines {
        Lines {
            offset: self.offset,
            limit: self.limit.unwrap_or(usize::MAX),
        }
    }

    pub fn profiles(&self) -> Mix {
        self.profile_mix
            .clone()
            .unwrap_or_else(|| Mix::all(&self.profile.to_string()))
    }

    pub fn rate(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.rate)
    }
}

fn profile_mix(text: &str) -> Result<Mix, String> {
    let mix: Mix = text.parse().map_err(|error| format!("{error}"))?;
    for name in mix.names() {
        name.parse::<Profile>().map_err(|error| error.to_string())?;
    }
    Ok(mix)
}

fn messages_per_minute(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.0..=PER_MINUTE_MAX).contains(&rate) {
        Ok(rate)
    } else {
        Err(format!("expected 0 to {PER_MINUTE_MAX}"))
    }
}

fn part(text: &str) -> Result<Range<usize>, String> {
    let (first, end) = text.split_once("..").ok_or("expected FIRST..END")?;
    let number = |text: &str| text.parse::<usize>().map_err(|error| error.to_string());
    Ok(number(first)?..number(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAST: [&str; 5] = ["firmware-sim", "--url", "ws://127.0.0.1:1", "--devices", "d.csv"];

    fn parse(more: &[&str]) -> Result<Options, String> {
        Options::try_parse_from(LEAST.iter().chain(more)).map_err(|error| error.to_string())
    }

    #[test]
    fn contract_s_command_line_is_understood() {
        let options = parse(&[
            "--firmware-mix",
            "3.8.0-b2=70%,3.8.0-b3=30%",
            "--profile",
            "fixed-5s",
            "--seconds",
            "30",
        ])
        .unwrap();

        assert_eq!(options.profiles(), Mix::all("fixed-5s"));
        assert_eq!(options.seconds, Some(30));
    }

    #[test]
    fn wrong_use_is_told_in_words() {
        for (more, words) in [
            (["--profile", "nice"].as_slice(), "well-behaved"),
            (&["--profile-mix", "well-behaved=50%,nice=50%"], "no profile is called"),
            (&["--firmware-mix", "a=50%"], "add up to 50"),
            (
                &["--profile", "immediate", "--profile-mix", "immediate"],
                "cannot be used with",
            ),
            (&["--source", "x"], "invalid value 'x'"),
            (&["--messages-per-minute", "6001"], "expected 0 to 6000"),
        ] {
            let message = parse(more).unwrap_err();

            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn parent_may_add_what_is_there_already() {
        let options = parse(&["--json", "--json", "--part", "18000..20000"]).unwrap();

        assert_eq!(options.part, Some(18_000..20_000));
    }
}
