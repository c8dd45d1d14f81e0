//! `seawall migrate`: brings the tables of the database to this version, and does nothing else.

use super::{Common, Failure, ServeArgs, serve, table};
use crate::{runtime::data_dir::DataDir, serve::StartError, store::Store};

pub fn run(common: &Common, args: ServeArgs) -> Result<(), Failure> {
    let config = args.load_kept(common.data_dir.as_ref())?;
    let url = config.database_url();
    // Creates the data directory if the file is in it, as `serve` does.
    let is_inside = config.database.url.is_none();
    let _held = is_inside
        .then(|| DataDir::open(&config.server.data_dir))
        .transpose()
        .map_err(StartError::from)?;
    serve::runtime()?
        .block_on(Store::migrate(&url))
        .map_err(Failure::failed)?;
    table::print(&format!(
        "{} has the tables of this version\n",
        table::text(&url.to_string())
    ))
}
