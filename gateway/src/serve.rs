//! A gateway's start, in order, and its end. Start with [`start`].

use crate::{
    config::{Config, ConfigError, SettingError},
    data_dir::DataDirError,
};

/// Why a gateway did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A setting is wrong.
    #[error(transparent)]
    Setting(#[from] SettingError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
}

impl StartError {
    /// Whether other settings would help, rather than another machine.
    #[must_use]
    pub fn is_setting(&self) -> bool {
        match self {
            Self::Setting(_) | Self::DataDir(DataDirError::InUse { .. }) => true,
            Self::DataDir(DataDirError::Unusable { .. }) => false,
        }
    }
}

pub async fn until_signal(
    _config: Config,
    _reload: impl Fn() -> Result<String, ConfigError>,
) -> Result<(), StartError> {
    Ok(())
}
