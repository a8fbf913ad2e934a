"""Certificates that are renewed while a process runs, as cert-manager does it: new connections see the new ones."""

import logging

from services.common.tls.files import Tls, TlsError

logger = logging.getLogger(__name__)


class Renewing:
    """The files of one side. Any thread may ask."""

    def __init__(self, files: Tls) -> None:
        self._files = files
        self._told = ""

    def now(self) -> Tls:
        """Return the files as they are now: the same object until one changes.

        While they cannot be used (a key is written, its certificate not yet), the last that could count on, and the log
        says so once. Takes as long as asking the system for three files.
        """
        try:
            files = self._files.renewed()
        except TlsError as error:
            if str(error) != self._told:
                self._told = str(error)
                logger.warning("changed TLS files cannot be used: former ones count on", extra={"error": self._told})
            return self._files
        if files is not self._files:
            self._files, self._told = files, ""
            logger.info("TLS files were renewed", extra={"certificate": str(files.certificate)})
        return files
