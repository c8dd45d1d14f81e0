//! `seawall migrate`: brings the tables of the database to this version, and does nothing else.

use super::{Common, Failure, ServeArgs, serve, table};
use crate::{data_dir::DataDir, store::Store};

pub fn run(common: &Common, args: ServeArgs) -> Result<(), Failure> {
    let config = args.load(common.data_dir.as_ref())?;
    let url = config.database_url();
    // A file in the data directory has its directory made, as `serve` would.
    if config.database.url.is_none() {
        DataDir::open(&config.server.data_dir).map_err(crate::serve::StartError::from)?;
    }
    serve::runtime()?
        .block_on(Store::migrate(&url))
        .map_err(Failure::failed)?;
    table::print(&format!(
        "{} has the tables of this version\n",
        table::text(&url.to_string())
    ))
}
