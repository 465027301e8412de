"""What a token is: a revocable link to a facet, which is made by a mint, narrowed, and never copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, NoReturn, TypeVar, final

from vmm.errors import TokenOutOfScope, TokenRevoked

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

FacetT = TypeVar("FacetT")
FacetT_co = TypeVar("FacetT_co", covariant=True)
TokenT = TypeVar("TokenT", bound="Token[Any]")

_HOME: Final = __name__.rpartition(".")[0]
"""Where every kind is declared."""


@final
class _MintKey:
    """Held by mints. A type checker refuses the construction of a token without it."""

    __slots__ = ()


_MINT_KEY: Final = _MintKey()


@final
class Cell(Generic[FacetT_co]):
    """The revocable link between the tokens of one window and a facet."""

    __slots__ = ("_facet", "window")

    def __init__(self, facet: FacetT_co, window: str) -> None:
        self._facet: FacetT_co | None = facet
        self.window = window

    def facet(self, kind: str) -> FacetT_co:
        """Return the facet, or raise `TokenRevoked`."""
        if self._facet is None:
            raise TokenRevoked(kind=kind, window=self.window)
        return self._facet

    def revoke(self) -> None:
        """Cut the link, for every token that shares this cell."""
        self._facet = None


class Token(Generic[FacetT_co]):
    """Base of all tokens. Cannot be copied, pickled, widened, or subclassed outside this package."""

    __slots__ = ("__weakref__", "_cell", "scope")
    wire_name: ClassVar[str]

    def __init__(self, key: _MintKey, cell: Cell[FacetT_co], scope: frozenset[str] | None) -> None:
        if key is not _MINT_KEY:
            raise TypeError(f"{type(self).__name__} is minted by a phase's window only")
        self._cell = cell
        self.scope: Final = scope
        """The names that the token covers; None means all."""

    def __init_subclass__(cls) -> None:
        if cls.__module__.rpartition(".")[0] != _HOME:
            raise TypeError(f"token kinds form a closed set: declare {cls.__name__} in {_HOME}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"{self.wire_name} cannot be copied or sent elsewhere")

    def __repr__(self) -> str:
        scope = "" if self.scope is None else f" for {', '.join(sorted(self.scope))}"
        return f"<{self.wire_name} of {self._cell.window}{scope}>"

    @property
    def window(self) -> str:
        """Path of the phase whose window minted this token."""
        return self._cell.window

    def covers(self, name: str | None) -> bool:
        """Say whether the token may be used for `name` (None: for something that has no name)."""
        return self.scope is None or name in self.scope

    def only(self, *names: str) -> Self:
        """Return a token for `names` alone. Never wider than this one; revoked together with it."""
        wanted = frozenset(names)
        return type(self)(_MINT_KEY, self._cell, wanted if self.scope is None else wanted & self.scope)

    def _reach(self, name: str | None = None) -> FacetT_co:
        if self.scope is not None and name not in self.scope:
            scope = ", ".join(sorted(self.scope)) or "nothing"
            raise TokenOutOfScope(kind=self.wire_name, window=self.window, scope=scope, wanted=str(name))
        return self._cell.facet(self.wire_name)


AnyToken = Token[Any]


@final
class Mint:
    """Makes the tokens of one window, and takes all of them back at once.

    Minting confers nothing by itself: a token leads to the facet that it was minted for, and the minter had to hold
    that facet already.
    """

    def __init__(self, window: str) -> None:
        self.window: Final = window
        self._cells: list[Cell[Any]] = []

    def __call__(
        self,
        kind: Callable[[_MintKey, Cell[FacetT], frozenset[str] | None], TokenT],
        facet: FacetT,
        *,
        only: frozenset[str] | None = None,
    ) -> TokenT:
        """Mint a token of `kind` over `facet`, narrowed to `only` where given."""
        cell = Cell(facet, self.window)
        self._cells.append(cell)
        return kind(_MINT_KEY, cell, only)

    def revoke_all(self) -> None:
        """Cut every token minted here off its facet."""
        for cell in self._cells:
            cell.revoke()
