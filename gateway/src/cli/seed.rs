//! `seawall devices seed`: devices with random ids and secrets, for trials and load tests.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufWriter, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use clap::Args;
use rand::RngCore;
use serde_json::json;

use super::{Context, Failure, devices, note, table};

/// As many lines as one import takes.
const COUNT_MAX: u64 = 1_000_000;
/// A secret of ours: 256 random bits.
const SECRET_BYTES: usize = 32;

#[derive(Debug, Args)]
pub struct Seed {
    /// How many devices
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=COUNT_MAX))]
    count: u64,
    /// CSV file to write, readable by its owner only; a file with content is never overwritten
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tenant of all of them
    #[arg(long)]
    tenant: Option<String>,
    /// Model of all of them
    #[arg(long)]
    model: Option<String>,
    /// Only write the file
    #[arg(long)]
    offline: bool,
}

/// Writes the file, then registers the devices where a gateway answers.
pub fn run(ctx: &Context, args: &Seed) -> Result<(), Failure> {
    write(args).map_err(|error| Failure::failed(format!("{}: {error}", args.out.display())))?;
    let registered = if args.offline { None } else { register(ctx, &args.out)? };
    let report =
        json!({"file": args.out.display().to_string(), "count": args.count, "registered": registered.is_some()});
    ctx.show(&report, |_| {
        format!(
            "{} devices in {}\n",
            args.count,
            table::text(&args.out.display().to_string())
        )
    })
}

fn write(args: &Seed) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&args.out)?;
    // A device, as in /dev/stdout, has no length.
    if file.metadata()?.len() > 0 {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there are secrets in it already, perhaps: choose another file",
        ));
    }
    let mut lines = csv::Writer::from_writer(BufWriter::new(file));
    let with = |first: &str, second: &str, tenant: Option<&str>, model: Option<&str>| {
        let mut record = csv::StringRecord::from(vec![first, second]);
        tenant.into_iter().chain(model).for_each(|text| record.push_field(text));
        record
    };
    lines.write_record(&with(
        "id",
        "secret",
        args.tenant.as_ref().map(|_| "tenant"),
        args.model.as_ref().map(|_| "model"),
    ))?;
    let mut rng = rand::rng();
    let mut secret = [0; SECRET_BYTES];
    for _ in 0..args.count {
        rng.fill_bytes(&mut secret);
        let id = uuid::Builder::from_random_bytes(rand::Rng::random(&mut rng)).into_uuid();
        let secret = URL_SAFE_NO_PAD.encode(secret);
        lines.write_record(&with(
            &id.to_string(),
            &secret,
            args.tenant.as_deref(),
            args.model.as_deref(),
        ))?;
    }
    lines
        .into_inner()
        .map_err(|error| io::Error::other(error.to_string()))?
        .flush()
}

/// `None` where no gateway answers, or there is no token for one: then the file is all that was asked for.
fn register(ctx: &Context, path: &Path) -> Result<Option<serde_json::Value>, Failure> {
    let later = format!("later: seawall devices import {}", path.display());
    if matches!(ctx.client.get_any("/healthz", &[]), Err(Failure::Unreachable(_))) {
        note(&format!(
            "no gateway answers at {}, so that these devices are not registered; {later}",
            ctx.client.base()
        ));
        return Ok(None);
    }
    if !ctx.client.has_token() {
        note(&format!(
            "there is no token for {}, so that these devices are not registered; {later}",
            ctx.client.base()
        ));
        return Ok(None);
    }
    let mut file = File::open(path)?;
    devices::accepted(devices::upload(ctx, &mut file, false)?).map(Some)
}
