//! The arguments of a rule, and the rule that they make. Start with [`RuleArgs`].

use std::{
    io::{self, Read},
    path::PathBuf,
};

use clap::Args;
use seawall_proto::{
    firmware::{Range, RangeError},
    rules::{Effect, Mode, RuleSpec},
};
use serde_json::{Map, Value};

use super::{
    Failure,
    time::{point, span},
};

/// Default retry time of a rule with `--evict`, so that a mistake is undone within minutes.
const EVICT_RETRY_AFTER: &str = "2m";
/// Maximum size of a file for `rules add --file`, in bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The match of a rule, and its effect.
#[derive(Debug, Args)]
pub struct RuleArgs {
    /// Range of versions, in quotes, as in '>=3.8.0-b3', '3.8.*', '>=3.8,<3.9' or '=(none)'
    #[arg(value_name = "RANGE", value_parser = range)]
    firmware: Option<String>,
    /// This version and later ones; needs no quotes
    #[arg(long, value_name = "VERSION", value_parser = from, conflicts_with = "firmware")]
    from: Option<String>,
    /// Versions before this one; needs no quotes
    #[arg(long, value_name = "VERSION", value_parser = below, conflicts_with = "firmware")]
    below: Option<String>,
    /// Every version, including devices without one
    #[arg(long, conflicts_with_all = ["firmware", "from", "below"])]
    all_versions: bool,
    /// Only devices of this model
    #[arg(long)]
    model: Option<String>,
    /// Only devices of this tenant
    #[arg(long)]
    tenant: Option<String>,
    /// Reason; refused devices can read it
    #[arg(long)]
    reason: Option<String>,
    /// Minimum time before a refused device reconnects, as in 15m; at most twice that [default: 15m, with --evict 2m]
    #[arg(long, value_name = "SPAN", value_parser = span)]
    retry_after: Option<String>,
    /// When the rule ends: RFC 3339, or a duration from now as in 2h
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
    /// Also close matching sessions, at a pace
    #[arg(long)]
    evict: bool,
    /// Share of the matched devices that is admitted, in percent; always the same devices [default: 0]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(..=100))]
    admit_percent: Option<u8>,
    /// Device that the rule never applies to; may be given several times
    #[arg(long, value_name = "ID")]
    allow: Vec<String>,
    /// Only count what the rule would do
    #[arg(long)]
    dry_run: bool,
    /// Do it even if it refuses over 30 % of the connected devices
    #[arg(long)]
    pub confirm: bool,
}

/// What a rule does.
#[derive(Debug, Args)]
pub struct EffectArgs {
    /// block: refuse; restrict: send an update notice in a short anonymous session, and close; throttle: let devices
    /// connect at a separate rate [default of add: block]
    #[arg(long, value_parser = effect)]
    effect: Option<Effect>,
    /// With --effect restrict: the notice for devices, as a JSON object; public
    #[arg(long, value_name = "JSON", value_parser = update)]
    update_json: Option<Map<String, Value>>,
    /// The same from a file (`-`: standard input)
    #[arg(long, value_name = "FILE", conflicts_with = "update_json")]
    update_file: Option<PathBuf>,
    /// With --effect throttle: connect attempts per second that each node admits [default: 5 % of the capacity]
    #[arg(
        long,
        value_name = "PER_SECOND",
        value_parser = clap::value_parser!(u32).range(1..=i64::from(RuleSpec::RATE_MAX))
    )]
    rate: Option<u32>,
}

impl EffectArgs {
    /// Adds the given fields, and removes those that the effect does not have.
    pub fn insert_into(self, body: &mut Map<String, Value>) -> Result<(), Failure> {
        if let Some(effect) = self.effect {
            body.insert("effect".into(), effect.as_str().into());
            if effect != Effect::Restrict {
                body.insert("update".into(), Value::Null);
            }
            if effect != Effect::Throttle {
                body.insert("rate_per_second".into(), Value::Null);
            }
        }
        let update = match self.update_file {
            Some(path) => Some(from_file(&path)?),
            None => self.update_json,
        };
        insert(body, "update", update);
        insert(body, "rate_per_second", self.rate);
        Ok(())
    }
}

impl RuleArgs {
    /// Returns the given range, in the API's form.
    fn range(&self) -> Option<String> {
        if self.firmware.is_some() {
            return self.firmware.clone();
        }
        let parts: Vec<&str> = self.from.iter().chain(&self.below).map(String::as_str).collect();
        (!parts.is_empty()).then(|| parts.join(","))
    }

    /// Returns the rule in the API's form.
    pub fn body(self) -> Result<Map<String, Value>, Failure> {
        let firmware = self.range();
        if firmware.is_none() && !self.all_versions {
            return Err(Failure::WrongUse(
                "name the versions: a RANGE in quotes such as '>=3.8.0-b3', --from and --below, or --all-versions. Without quotes the shell takes > for a redirection to a file".into(),
            ));
        }
        let mut matches = Map::new();
        insert(&mut matches, "firmware", firmware);
        insert(&mut matches, "model", self.model);
        insert(&mut matches, "tenant", self.tenant);
        let mut body = Map::new();
        body.insert("match".into(), matches.into());
        insert(&mut body, "reason", self.reason);
        let evicting = || self.evict.then(|| EVICT_RETRY_AFTER.to_owned());
        insert(&mut body, "retry_after", self.retry_after.or_else(evicting));
        insert(&mut body, "expires_at", self.expires.as_deref().map(point).transpose()?);
        body.insert("evict".into(), self.evict.into());
        insert(&mut body, "admit_percent", self.admit_percent);
        if !self.allow.is_empty() {
            body.insert("allow".into(), self.allow.into());
        }
        body.insert("mode".into(), mode(self.dry_run).into());
        Ok(with_confirm(body, self.confirm))
    }
}

/// Returns the mode of a rule in the API's form.
pub const fn mode(is_dry_run: bool) -> &'static str {
    if is_dry_run {
        Mode::DryRun.as_str()
    } else {
        Mode::Enforce.as_str()
    }
}

/// Adds the confirmation, if it was given.
pub fn with_confirm(mut body: Map<String, Value>, is_confirmed: bool) -> Map<String, Value> {
    if is_confirmed {
        body.insert("confirm".into(), true.into());
    }
    body
}

/// Adds a field that was given.
pub fn insert(body: &mut Map<String, Value>, key: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        body.insert(key.into(), value.into());
    }
}

/// Reads a JSON object from a file, or from standard input if the path is `-`.
pub fn from_file(path: &PathBuf) -> Result<Map<String, Value>, Failure> {
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        io::stdin().take(FILE_BYTES_MAX).read_to_string(&mut text)
    } else {
        std::fs::File::open(path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text))
    };
    read.map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
    serde_json::from_str(&text).map_err(|error| Failure::WrongUse(format!("{}: {error}", path.display())))
}

pub fn effect(text: &str) -> Result<Effect, String> {
    let known = Effect::ALL.into_iter().find(|effect| effect.as_str() == text);
    known.ok_or_else(|| format!("expected one of {}", Effect::ALL.map(Effect::as_str).join(", ")))
}

fn update(text: &str) -> Result<Map<String, Value>, serde_json::Error> {
    serde_json::from_str(text)
}

/// Parses a range, so that a wrong one is found before anything is sent.
pub fn range(text: &str) -> Result<String, RangeError> {
    text.parse::<Range>().map(|_| text.to_owned())
}

/// Returns the range of this version and later ones.
fn from(version: &str) -> Result<String, RangeError> {
    range(&format!(">={version}"))
}

/// Returns the range of the versions before this one.
fn below(version: &str) -> Result<String, RangeError> {
    range(&format!("<{version}"))
}
