"""Values of Parquet files that may be damaged, by PyArrow."""

from typing import Any


def unpacked(file: Any) -> int:
    """Return the size of a Parquet file's decompressed columns, as it claims.

    The metadata of single columns would tell more, but PyArrow aborts on damaged ones.
    """
    groups = range(file.metadata.num_row_groups)
    return sum(file.metadata.row_group(group).total_byte_size for group in groups)


def decoded(batch: Any) -> Any:
    """Return a batch of rows without dictionaries, of which each batch would hold all entries."""
    import pyarrow as pa

    def decoded(column: Any) -> Any:
        if not pa.types.is_dictionary(column.type):
            return column
        column.validate(full=True)  # of a damaged file, indices may lie outside
        return column.dictionary_decode()

    columns = list(map(decoded, batch.columns))
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def values(column: Any) -> list[Any]:
    """Return the values of a column of Parquet whose text may be invalid."""
    return [_text(value, column.type) for value in column.cast(_binary(column.type)).to_pylist()]


def _binary(kind: Any) -> Any:
    """Return an Arrow type with its text replaced by bytes."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind):
        return pa.list_(_binary(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _binary(field.type)) for field in kind])
    return kind


def _text(value: Any, kind: Any) -> Any:
    """Return a value of the type `_binary(kind)` as one of the Arrow type `kind`."""
    import pyarrow as pa

    if value is None:
        return None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return value.decode("utf-8", "surrogateescape")
    if pa.types.is_list(kind):
        return [_text(one, kind.value_type) for one in value]
    if pa.types.is_struct(kind):
        return {field.name: _text(value[field.name], field.type) for field in kind}
    return value
